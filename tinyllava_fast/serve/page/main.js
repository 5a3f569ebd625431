// The page: what the controls do.

import { ApiError, canLook, models, setKey } from "./api.js";
import { Answer } from "./answer.js";
import { messages } from "./conversation.js";
import { $, eachFrame, tell } from "./dom.js";
import { LookTab } from "./look.js";
import { Pictures } from "./pictures.js";
import * as settings from "./settings.js";
import { Speaker, drawTurns, follow } from "./view.js";

const pictures = new Pictures();
const lookTab = new LookTab(() => ({ turns, model: $("model").value, system: settings.system() }), failed);
let turns = []; // {text, pictures, answers: one a model}
let editing = null;
let running = null; // the AbortController of the answers that arrive

const comparing = () => $("compare").getAttribute("aria-pressed") === "true";
const chosen = () => [$("model").value, ...(comparing() ? [$("rival").value] : [])];
const draw = () => drawTurns(turns, { edit, retry });

async function loadModels() {
  try {
    const names = await models();
    for (const select of [$("model"), $("rival")]) {
      const before = select.value;
      select.replaceChildren(...names.map((name) => new Option(name, name)));
      if (names.includes(before)) select.value = before;
    }
    if (names.length > 1 && !$("rival").selectedIndex) $("rival").selectedIndex = 1;
    $("look-tab").hidden = !names.some(canLook);
    tell($("notice"), "");
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  if (error instanceof ApiError && error.status === 401) askKey();
  else tell($("notice"), error.message);
}

function askKey() {
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

async function send() {
  const text = $("question").value.trim();
  if (running || (!text && !pictures.list.length)) return;
  if (!$("model").value) {
    await loadModels();
    if (!$("model").value) return;
  }
  if (editing) turns = turns.slice(0, turns.indexOf(editing));
  const turn = { text, pictures: pictures.list, answers: [] };
  if (!(await answer([...turns, turn]))) return;
  stopEditing();
  $("question").value = "";
  grow();
  pictures.set([]);
}

/** Ask the models about the last of the turns. False, and nothing is changed, if a setting is wrong. */
async function answer(asked) {
  const wrong = settings.problem();
  tell($("notice"), wrong);
  if (wrong) return false;
  turns = asked;
  lookTab.close();
  const turn = turns.at(-1);
  turn.answers = chosen().map((model) => new Answer(model));
  running = new AbortController();
  controls();
  draw();
  $("chat").scrollTop = $("chat").scrollHeight;
  finish(turn, running.signal);
  return true;
}

async function finish(turn, signal) {
  const speaker = new Speaker();
  const more = { ...settings.parameters() };
  await Promise.all(turn.answers.map(async (one, side) => {
    const body = { ...more, messages: messages(settings.system(), turns, side) };
    const show = eachFrame(() => {
      follow(() => one.shown.update());
      speaker.tell(one, turn.answers.length > 1);
    });
    await one.ask(body, signal, show.soon);
    show.now();
  }));
  running = null;
  follow(controls);
  const failed = (status) => turn.answers.some((one) => one.error?.status === status);
  if (failed(401)) askKey();
  if (failed(404)) await loadModels(); // the server has been started anew, with other models
}

function retry(turn) {
  if (running) return;
  stopEditing();
  answer([...turns.slice(0, turns.indexOf(turn)), turn]);
}

function edit(turn) {
  editing = turn;
  const number = turns.indexOf(turn) + 1;
  const later = number < turns.length ? " What follows it will be asked anew by you." : "";
  $("editing-text").textContent = `Editing question ${number}.${later}`;
  $("editing").hidden = false;
  $("question").value = turn.text;
  grow();
  pictures.set(turn.pictures);
  $("question").focus();
}

function stopEditing() {
  editing = null;
  $("editing").hidden = true;
}

/** Show the controls that can be used now. */
function controls() {
  const had = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("turns").classList.toggle("busy", running !== null);
  for (const name of ["fresh", "compare", "model", "rival"]) $(name).disabled = running !== null;
  if (had) (running ? $("stop") : $("question")).focus();
}

const stop = () => running?.abort();

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 200)}px`;
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("question").addEventListener("input", grow);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  $("stop").addEventListener("click", stop);
  $("editing-cancel").addEventListener("click", () => {
    stopEditing();
    $("question").value = "";
    grow();
    pictures.set([]);
    $("question").focus();
  });
  $("fresh").addEventListener("click", () => {
    turns = [];
    lookTab.close();
    stopEditing();
    pictures.set([]);
    tell($("notice"), "");
    draw();
    $("question").focus();
  });
  $("compare").addEventListener("click", () => {
    $("compare").setAttribute("aria-pressed", String(!comparing()));
    $("rival-box").hidden = !comparing();
    document.body.classList.toggle("comparing", comparing());
  });
  $("key-form").addEventListener("submit", useKey);
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
}

async function useKey(event) {
  event.preventDefault();
  const key = $("key").value.trim();
  $("key-wrong").hidden = true;
  try {
    if (!/^[\x21-\x7e]+$/.test(key)) throw new ApiError(401, "");
    setKey(key);
    await models();
  } catch (error) {
    setKey("");
    $("key-wrong").hidden = error.status !== 401;
    if (error.status === 401) return;
  }
  $("key").value = "";
  $("key-dialog").close();
  await loadModels();
  $("question").focus();
}

settings.start();
wire();
loadModels();
