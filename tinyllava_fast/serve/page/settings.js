// Settings of the answers, kept in this browser, and the page's theme.

import { $, store, stored } from "./dom.js";

const DEFAULTS = { temperature: "0", max_tokens: "256", top_logprobs: "5" };
const form = $("settings-form");

/** Show the settings that were kept, and keep what is changed. */
export function start() {
  fill(kept());
  form.addEventListener("input", () => {
    const given = [...new FormData(form)].filter(([name, value]) => value !== (DEFAULTS[name] ?? ""));
    store("localStorage", "settings", JSON.stringify(Object.fromEntries(given)));
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  $("settings-reset").addEventListener("click", () => {
    store("localStorage", "settings", null);
    fill({});
  });
  $("settings-button").addEventListener("click", () => open($("settings").hidden));
  $("settings-close").addEventListener("click", () => open(false));
  $("settings").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    open(false);
  });
  theme();
}

function kept() {
  try {
    return JSON.parse(stored("localStorage", "settings")) ?? {};
  } catch {
    return {};
  }
}

function fill(values) {
  for (const field of form.elements) field.value = values[field.name] ?? DEFAULTS[field.name] ?? "";
}

function open(wanted) {
  $("settings").hidden = !wanted;
  $("settings-button").setAttribute("aria-expanded", String(wanted));
  if (wanted) form.elements.system.focus();
  else $("settings-button").focus();
}

/** Return the first setting that is out of range in words, "" if all are right; the panel is opened on it. */
export function problem() {
  const wrong = [...form.elements].find((field) => !field.checkValidity());
  if (!wrong) return "";
  open(true);
  wrong.focus();
  return `${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.validationMessage}`;
}

/** Return the system text, "" for none. */
export const system = () => form.elements.system.value.trim();

/** Return the settings as parameters of a request. */
export function parameters() {
  const found = {};
  for (const field of form.elements) {
    if (field.type === "number" && field.value !== "") found[field.name] = Number(field.value);
  }
  const stop = form.elements.stop.value.split("\n").filter(Boolean);
  if (stop.length) found.stop = stop;
  if (found.top_logprobs) found.logprobs = true;
  else delete found.top_logprobs;
  return found;
}

function theme() {
  const root = document.documentElement; // theme.js sets its theme, and keeps to the system's if none is chosen
  const system = matchMedia("(prefers-color-scheme: dark)");
  const other = () => (root.dataset.theme === "dark" ? "light" : "dark");
  const draw = () => ($("theme").textContent = other() === "dark" ? "Dark" : "Light");
  $("theme").addEventListener("click", () => {
    root.dataset.theme = other();
    const same = (root.dataset.theme === "dark") === system.matches;
    store("localStorage", "theme", same ? null : root.dataset.theme);
    draw();
  });
  system.addEventListener("change", draw);
  draw();
}
