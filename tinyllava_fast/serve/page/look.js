// The tab that looks inside the answer to the last question, see ../look/viewer.js.

import { canLook, look } from "./api.js";
import { messages } from "./conversation.js";
import { $ } from "./dom.js";

export class LookTab {
  #state;
  #failed;
  #running = null;

  /** state: returns {turns, model, system}. failed: takes an error that is not about the question. */
  constructor(state, failed) {
    this.#state = state;
    this.#failed = failed;
    $("look-tab").addEventListener("click", () => ($("look").hidden ? this.open() : this.close()));
  }

  close() {
    this.#running?.abort();
    this.#running = null;
    this.#show(false);
  }

  async open() {
    const { turns, model, system } = this.#state();
    this.#show(true);
    $("look-view").replaceChildren();
    if (!canLook(model)) return this.#say("This model was not started with --look.");
    if (!turns.some((turn) => turn.pictures.length)) return this.#say("Ask about a picture first, then look inside.");
    this.#say("Looking: the answer is made again, greedily, then taken apart…");
    const running = (this.#running = new AbortController());
    try {
      const data = await look({ model, messages: messages(system, turns, 0) }, running.signal);
      if (this.#running !== running) return;
      this.#say(data.answer || "(an empty answer)");
      window.showLook($("look-view"), data);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#say(error.message);
      if (error.status === 401) this.#failed(error);
    }
  }

  #say(text) {
    $("look-said").textContent = text;
  }

  #show(open) {
    $("look").hidden = !open;
    $("chat").hidden = open;
    $("look-tab").setAttribute("aria-pressed", String(open));
  }
}
