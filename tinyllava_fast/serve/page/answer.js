// One answer: what has arrived of it, how fast, and how sure the model was.

import { chat } from "./api.js";

/** An answer of one model. state: waiting, streaming, done, stopped or failed. */
export class Answer {
  constructor(model) {
    this.model = model;
    this.state = "waiting";
    this.text = "";
    this.tokens = []; // {token, logprob, top_logprobs} as the server sends them
    this.error = null;
    this.finish = null;
    this.usage = null;
    this.pieces = 0;
    this.began = performance.now();
    this.first = null;
    this.last = null;
  }

  get running() {
    return this.state === "waiting" || this.state === "streaming";
  }

  /** Ask, and call changed() whenever there is more to show. */
  async ask(body, signal, changed) {
    try {
      for await (const chunk of chat({ ...body, model: this.model }, signal)) {
        this.take(chunk);
        changed();
      }
      this.state = "done";
    } catch (error) {
      this.state = error.name === "AbortError" ? "stopped" : "failed";
      this.error = this.state === "failed" ? error : null;
    }
    changed();
  }

  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    for (const choice of chunk.choices ?? []) {
      const tokens = choice.logprobs?.content ?? [];
      const text = choice.delta?.content ?? "";
      this.tokens.push(...tokens);
      this.finish = choice.finish_reason ?? this.finish;
      this.last = performance.now();
      if (!text && !tokens.length) continue;
      this.first ??= this.last;
      this.state = "streaming";
      this.text += text;
      this.pieces += 1;
    }
  }

  /** What is known of its speed and end, in words. */
  get facts() {
    const count = this.usage?.completion_tokens ?? Math.max(this.tokens.length, this.pieces);
    const facts = [];
    if (this.first !== null) facts.push(`${seconds(this.first - this.began)} to first token`);
    if (this.first !== null && this.last - this.first > 50 && count > 1) {
      facts.push(`${(((count - 1) * 1000) / (this.last - this.first)).toFixed(1)} tokens/s`);
    }
    if (count) facts.push(count === 1 ? "1 token" : `${count} tokens`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) facts.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens cached`);
    if (this.state === "stopped") facts.push("stopped");
    if (this.finish === "length") facts.push("cut at the most tokens");
    return facts;
  }
}

const seconds = (ms) => (ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
