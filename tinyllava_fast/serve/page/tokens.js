// The tokens of an answer: where each stands in the text, and what else it could have been.

import { $, make } from "./dom.js";

const LEVELS = [0.9, 0.6, 0.3];

/**
 * Return [text, token] pairs that add up to the text. A token is null for text that belongs to none; tokens that
 * are parts of one character share its text with the first of them; a token that shows nothing ends the list.
 */
export function align(text, tokens) {
  const pairs = [];
  let at = 0;
  let waiting = null; // a token whose text is not found yet
  const until = (end) => {
    if (end > at) pairs.push([text.slice(at, end), waiting]);
    at = end;
    waiting = null;
  };
  for (const token of tokens) {
    const shown = pairs.length || at ? token.token : token.token.trimStart() || token.token;
    const found = shown && !shown.includes("\ufffd") ? text.indexOf(shown, at) : -1;
    if (found === at || (found > at && waiting && found - at <= 8)) {
      until(found);
      pairs.push([shown, token]);
      at += shown.length;
    } else {
      waiting ??= token;
    }
  }
  const end = waiting;
  if (at < text.length) until(text.length);
  else if (end) pairs.push(["", end]);
  return pairs;
}

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
};

/** Return a token's text with its blanks made visible. */
export const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(nothing)";

/** Return the text of an answer as an element whose tokens can be pointed at, and walked with the arrow keys. */
export function tokenText(answer, note) {
  const spans = [];
  const box = make("div", { class: "text", dir: "auto", tabindex: "0", role: "group", "aria-label": note });
  for (const [text, token] of align(answer.text, answer.tokens)) {
    if (!token) {
      box.append(text);
      continue;
    }
    const sure = LEVELS.findIndex((level) => Math.exp(token.logprob) >= level);
    const span = make("span", { class: `token sure-${sure < 0 ? LEVELS.length : sure}` }, text);
    if (!text) span.classList.add("end"); // the style sheet gives it something to point at
    span.addEventListener("mouseenter", () => show(span, token));
    span.addEventListener("click", () => walk(spans.findIndex((one) => one.span === span)));
    spans.push({ span, token });
    box.append(span);
  }
  let current = -1;
  const walk = (to) => {
    spans[current]?.span.classList.remove("current");
    current = Math.max(0, Math.min(to, spans.length - 1));
    spans[current].span.classList.add("current");
    show(spans[current].span, spans[current].token);
    $("said").textContent = described(spans[current].token);
  };
  const leave = () => {
    spans[current]?.span.classList.remove("current");
    current = -1;
    hide();
  };
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("tip").hidden) {
      event.stopPropagation();
      leave();
    }
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    walk(current < 0 && Math.abs(steps[event.key]) === 1 ? 0 : current + steps[event.key]);
  });
  box.addEventListener("focus", () => box.matches(":focus-visible") && walk(0));
  box.addEventListener("blur", leave);
  box.addEventListener("mouseleave", hide);
  return box;
}

function described(token) {
  const others = (token.top_logprobs ?? []).filter((one) => one.token !== token.token);
  const words = [`${visible(token.token)}: ${percent(token.logprob)}.`];
  if (others.length) words.push(`Also: ${others.map((one) => `${visible(one.token)} ${percent(one.logprob)}`).join(", ")}.`);
  return words.join(" ");
}

function show(span, token) {
  const tip = $("tip");
  const top = token.top_logprobs ?? [];
  const rows = top.some((one) => one.token === token.token) ? top : [token, ...top];
  const table = rows.map((one) => {
    const bar = make("div", { class: "bar" });
    bar.style.width = `${100 * Math.exp(one.logprob)}%`;
    return make("tr", { class: one.token === token.token && "chosen" },
      make("td", { dir: "auto" }, visible(one.token)), make("td", {}, bar), make("td", {}, percent(one.logprob)));
  });
  tip.replaceChildren(make("table", {}, make("tbody", {}, ...table)));
  tip.hidden = false;
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(place.left, width - tip.offsetWidth - 8))}px`;
  const above = place.top - tip.offsetHeight - 6;
  tip.style.top = `${above > 4 ? above : place.bottom + 6}px`;
}

/** Hide what is shown of a token. */
export function hide() {
  $("tip").hidden = true;
}
