// The tokens of an answer: where each stands in the text, and what else it could have been.

import { $, make } from "./dom.js";

const LEVELS = [0.9, 0.6, 0.3];

/**
 * Return [text, token] pairs that add up to the text. A token is null for text that belongs to none; tokens that
 * are parts of one character share its text with the first of them; a token that shows nothing ends the list.
 * begun: other text stands before this one.
 */
export function align(text, tokens, begun = false) {
  const pairs = [];
  let at = 0;
  let waiting = null; // a token whose text is not found yet
  const until = (end) => {
    if (end > at) pairs.push([text.slice(at, end), waiting]);
    at = end;
    waiting = null;
  };
  for (const token of tokens) {
    const shown = begun || pairs.length || at ? token.token : token.token.trimStart() || token.token;
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

const STEPS = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
const UNSETTLED = 32; // tokens at the end whose text may still come, and change where they stand

/** The text of an answer while it grows. Its tokens can be pointed at, and walked with the arrow keys. */
export class TokenText {
  #note;
  #drawn = []; // {text, token, node} in order; a token is null for text that belongs to none
  #settled = { count: 0, at: 0, used: 0 }; // of #drawn, of the text, of the tokens: what is never looked at again
  #current = null;

  /** note: what a screen reader is told of it. */
  constructor(note) {
    this.#note = note;
    this.box = make("div", { class: "text", dir: "auto" });
    this.box.addEventListener("keydown", (event) => this.#step(event));
    this.box.addEventListener("focus", () => this.box.matches(":focus-visible") && this.#walk(0));
    this.box.addEventListener("blur", () => this.#leave());
    this.box.addEventListener("mouseleave", hide);
  }

  /** Show what has arrived, all of it if it has ended. What is on the screen already stays. */
  update(text, tokens, ended) {
    const { count, at, used } = this.#settled;
    const pairs = align(text.slice(at), tokens.slice(used), count > 0);
    if (!ended && pairs.at(-1)?.[0] === "") pairs.pop(); // its text may be on its way
    const changed = pairs.findIndex(([part, token], index) => {
      const drawn = this.#drawn[count + index];
      return drawn?.text !== part || drawn.token !== token;
    });
    const from = count + (changed < 0 ? pairs.length : changed);
    for (const old of this.#drawn.splice(from)) {
      if (old === this.#current) this.#leave();
      old.node.remove();
    }
    for (const [part, token] of pairs.slice(from - count)) this.#add(part, token);
    if (tokens.length && !this.box.hasAttribute("tabindex")) {
      for (const [name, value] of [["tabindex", "0"], ["role", "group"], ["aria-label", this.#note]]) this.box.setAttribute(name, value);
    }
    this.#settle(tokens);
  }

  #add(text, token) {
    const drawn = { text, token, node: token ? make("span", { class: `token ${level(token)}` }, text) : new Text(text) };
    if (token) {
      if (!text) drawn.node.classList.add("end"); // the style sheet gives it something to point at
      drawn.node.addEventListener("mouseenter", () => show(drawn.node, token));
      drawn.node.addEventListener("click", () => this.#to(drawn));
    }
    this.#drawn.push(drawn);
    this.box.append(drawn.node);
  }

  #settle(tokens) {
    const { count, at, used } = this.#settled;
    if (this.#drawn.length - count < 2 * UNSETTLED) return;
    let next = this.#drawn.length - UNSETTLED;
    while (next > count && !this.#drawn[next].token) next -= 1;
    const length = this.#drawn.slice(count, next).reduce((sum, one) => sum + one.text.length, 0);
    const first = tokens.indexOf(this.#drawn[next].token, used);
    if (first >= 0) this.#settled = { count: next, at: at + length, used: first };
  }

  #step(event) {
    if (event.key === "Escape" && !$("tip").hidden) {
      event.stopPropagation();
      this.#leave();
    }
    if (!(event.key in STEPS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const by = STEPS[event.key];
    this.#walk(this.#current || Math.abs(by) > 1 ? by : 0);
  }

  /** Go so many tokens on from the current one, or from the first. */
  #walk(by) {
    const all = this.#drawn.filter((one) => one.token);
    const to = Math.max(0, all.indexOf(this.#current)) + by;
    if (all.length) this.#to(all[Math.max(0, Math.min(to, all.length - 1))]);
  }

  #to(drawn) {
    this.#current?.node.classList.remove("current");
    this.#current = drawn;
    drawn.node.classList.add("current");
    show(drawn.node, drawn.token);
    $("said").textContent = described(drawn.token);
  }

  #leave() {
    this.#current?.node.classList.remove("current");
    this.#current = null;
    hide();
  }
}

/** Return the class of a token: how sure the model was. */
function level(token) {
  const sure = LEVELS.findIndex((least) => Math.exp(token.logprob) >= least);
  return `sure-${sure < 0 ? LEVELS.length : sure}`;
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
  pointed = span;
  place();
}

let pointed = null; // the element of the token that the tip is about

function place() {
  const tip = $("tip");
  if (tip.hidden || !pointed) return;
  const at = pointed.getClientRects()[0] ?? pointed.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(at.left, width - tip.offsetWidth - 8))}px`;
  const above = at.top - tip.offsetHeight - 6;
  tip.style.top = `${above > 4 ? above : at.bottom + 6}px`;
}

/** Hide what is shown of a token. */
export function hide() {
  $("tip").hidden = true;
}

document.addEventListener("scroll", place, { capture: true, passive: true }); // an answer that grows moves its tokens
