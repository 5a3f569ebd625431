// Elements without markup: whatever a model, a server or a file says goes in as text.

/** Return the element of that id. */
export const $ = (id) => document.getElementById(id);

/** Return a new element. Children are elements or texts; attributes of value false or null are left out. */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Return a button. */
export const button = (text, onclick, more = {}) => make("button", { type: "button", class: "quiet", onclick, ...more }, text);

/** Show a text in an element, or hide it for an empty one. */
export function tell(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

/** Draw at most once a frame of the screen, however often soon() is called; now() draws at once, as at the end. */
export function eachFrame(draw) {
  let wanted = 0;
  const now = () => {
    cancelAnimationFrame(wanted);
    wanted = 0;
    draw();
  };
  return { now, soon: () => (wanted ||= requestAnimationFrame(now)) };
}

/** Copy a text; false if the browser does not let a page do so. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Refused, or a page over plain HTTP from another machine: the older way may still work.
  }
  const before = document.activeElement;
  const box = make("textarea", { class: "unseen", "aria-hidden": "true" });
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  before?.focus();
  return done;
}

/** Read from the browser's storage; null where it is off or empty. */
export function stored(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

/** Write to the browser's storage, if it is on. */
export function store(storage, name, value) {
  try {
    if (value === null) window[storage].removeItem(name);
    else window[storage].setItem(name, value);
  } catch {
    // Private windows may refuse: then it is kept until the page is closed.
  }
}
