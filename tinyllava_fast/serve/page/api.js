// The server's routes: the list of models, and an answer as a stream of events.

import { store, stored } from "./dom.js";

let key = stored("sessionStorage", "key") ?? "";

/** What the server, or the way to it, says against a request. status: of HTTP, 0 if there was no answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Keep the key for this tab. */
export function setKey(value) {
  key = value;
  store("sessionStorage", "key", value || null);
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  try {
    const { error } = await response.json();
    if (typeof error.message === "string") return error.message;
  } catch {
    // Not this server's form; the status says what there is to say.
  }
  return `The server answered with status ${response.status}.`;
}

/** Return the names of the models, and of those whose answers can be looked into. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  lookable = new Set(data.filter((model) => model.look).map((model) => String(model.id)));
  return data.map((model) => String(model.id));
}

let lookable = new Set();

/** Whether a model's answers can be looked into. */
export const canLook = (model) => lookable.has(model);

/** Return what viewer.js draws of the greedy answer to a conversation. */
export async function look(body, signal) {
  const response = await request("v1/look", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  return response.json();
}

/** Yield the chunks of a streamed answer. signal: aborts it, which the server notices. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, String(chunk.error.message));
    yield chunk;
  }
  throw new ApiError(0, "The connection ended before the answer did.");
}

/** Yield the data of server-sent events. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The connection broke before the answer ended.");
      });
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const found = rest.split(/\r?\n\r?\n/);
      rest = found.pop();
      for (const event of found) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
