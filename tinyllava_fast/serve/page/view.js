// The conversation on the screen, and what a screen reader is told of it.

import { $, button, make } from "./dom.js";
import { thumbnail } from "./pictures.js";
import { hide, tokenText } from "./tokens.js";

const NOTE = "Answer. Arrow keys show the probability of each token.";

/** Draw all turns. actions: {edit(turn), retry(turn)}; busy: no action is offered. */
export function drawTurns(turns, actions, busy) {
  hide();
  $("empty").hidden = turns.length > 0;
  $("turns").replaceChildren(...turns.map((turn, index) => {
    const last = index === turns.length - 1;
    return make("article", { class: "turn", "aria-label": `Turn ${index + 1}` },
      drawQuestion(turn, index, actions, busy),
      make("div", { class: turn.answers.length > 1 ? "answers two" : "answers" },
        ...turn.answers.map(drawAnswer)),
      ...(last && !busy ? [button("Retry", () => actions.retry(turn), { "aria-label": "Retry the last question" })] : []));
  }));
}

function drawQuestion(turn, index, actions, busy) {
  const pictures = turn.pictures.map(thumbnail);
  return make("section", { class: "question", "aria-label": "You" },
    ...(pictures.length ? [make("div", { class: "pictures" }, ...pictures)] : []),
    ...(turn.text ? [make("p", { class: "text", dir: "auto" }, turn.text)] : []),
    ...(busy ? [] : [button("Edit", () => actions.edit(turn), { "aria-label": `Edit question ${index + 1}` })]));
}

function drawAnswer(answer) {
  answer.section = make("section", { class: "answer" },
    make("h3", { dir: "auto" }, answer.model), make("div", { class: "body" }), make("p", { class: "facts" }));
  drawText(answer);
  return answer.section;
}

/** Draw what has arrived of an answer; its tokens can be looked at once it has ended. */
export function drawText(answer) {
  const [body, facts] = [answer.section.querySelector(".body"), answer.section.querySelector(".facts")];
  answer.section.setAttribute("aria-busy", String(answer.running));
  answer.section.setAttribute("aria-label", `Answer of ${answer.model}`);
  if (answer.running) {
    const text = body.firstChild ?? body.appendChild(make("p", { class: "text", dir: "auto" }));
    text.textContent = answer.text;
    text.classList.toggle("waiting", !answer.text);
  } else {
    body.replaceChildren();
    if (answer.state === "done" && !answer.text) body.append(make("p", { class: "hint" }, "An empty answer."));
    if (answer.tokens.length) body.append(tokenText(answer, NOTE));
    else if (answer.text) body.append(make("p", { class: "text", dir: "auto" }, answer.text));
    if (answer.error) {
      body.append(make("p", { class: "error", dir: "auto" }, answer.error.message),
        make("p", { class: "hint" }, "This turn is left out of what follows. Edit the question, or retry."));
    }
  }
  facts.textContent = answer.running && !answer.text ? "reading…" : answer.facts.join(" · ");
}

/** Keep the end of the conversation in sight, unless the reader has scrolled away from it. */
export function follow(draw) {
  const chat = $("chat");
  const near = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80;
  draw();
  if (near) chat.scrollTop = chat.scrollHeight;
}

/** Tells a screen reader an answer sentence by sentence as it arrives. */
export class Speaker {
  constructor() {
    $("spoken").replaceChildren();
    this.told = new Map();
  }

  /** Tell what is new: whole sentences, and the rest once the answer has ended. */
  tell(answer, withName) {
    const from = this.told.get(answer) ?? 0;
    let end = answer.text.length;
    if (answer.running) {
      const sentences = [...answer.text.slice(from).matchAll(/[.!?。！？\n]\s/gu)];
      if (!sentences.length) return;
      end = from + sentences.at(-1).index + 1;
    }
    const name = withName && !from ? `${answer.model}: ` : "";
    const more = answer.text.slice(from, end).trim() + (answer.error ? ` Error: ${answer.error.message}` : "");
    this.told.set(answer, end);
    if (more.trim()) $("spoken").append(make("p", {}, name + more));
  }
}
