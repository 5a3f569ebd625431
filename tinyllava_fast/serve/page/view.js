// The conversation on the screen, and what a screen reader is told of it.

import { $, button, copy, make } from "./dom.js";
import { thumbnail } from "./pictures.js";
import { TokenText, hide } from "./tokens.js";

const NOTE = "Answer. Arrow keys show the probability of each token.";

/** Draw all turns. actions: {edit(turn), retry(turn)}. */
export function drawTurns(turns, actions) {
  hide();
  $("empty").hidden = turns.length > 0;
  $("turns").replaceChildren(...turns.map((turn, index) => {
    const last = index === turns.length - 1;
    return make("article", { class: "turn", "aria-label": `Turn ${index + 1}` },
      drawQuestion(turn, index, actions),
      make("div", { class: turn.answers.length > 1 ? "answers two" : "answers" },
        ...turn.answers.map((answer) => (answer.shown ??= new Shown(answer)).section)),
      ...(last ? [button("Retry", () => actions.retry(turn), { "aria-label": "Retry the last question" })] : []));
  }));
}

function drawQuestion(turn, index, actions) {
  const pictures = turn.pictures.map(thumbnail);
  return make("section", { class: "question", "aria-label": "You" },
    ...(pictures.length ? [make("div", { class: "pictures" }, ...pictures)] : []),
    ...(turn.text ? [make("p", { class: "text", dir: "auto" }, turn.text)] : []),
    button("Edit", () => actions.edit(turn), { "aria-label": `Edit question ${index + 1}` }));
}

/** An answer on the screen. */
class Shown {
  #answer;
  #text = new TokenText(NOTE);
  #body = make("div", { class: "body" }, this.#text.box);
  #facts = make("p", { class: "facts" });
  #copy = button("Copy", () => this.#copied(), { "aria-label": "Copy this answer" });

  constructor(answer) {
    this.#answer = answer;
    this.section = make("section", { class: "answer", "aria-label": `Answer of ${answer.model}` },
      make("h3", { dir: "auto" }, answer.model), this.#body, make("div", { class: "foot" }, this.#facts, this.#copy));
    this.update();
  }

  /** Show what has arrived. */
  update() {
    const { running, state, text, tokens, error, facts } = this.#answer;
    this.section.setAttribute("aria-busy", String(running));
    this.#text.update(text, tokens, !running);
    this.#text.box.classList.toggle("waiting", running && !text);
    this.#facts.textContent = running && !text ? "reading…" : facts.join(" · ");
    this.#copy.hidden = !text;
    if (state === "done" && !text) this.#body.append(make("p", { class: "hint" }, "An empty answer."));
    if (error) {
      this.#body.append(make("p", { class: "error", dir: "auto" }, error.message),
        make("p", { class: "hint" }, "This turn is left out of what follows. Edit the question, or retry."));
    }
  }

  async #copied() {
    const done = await copy(this.#answer.text);
    this.#copy.textContent = $("said").textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (this.#copy.textContent = "Copy"), 2000);
  }
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
