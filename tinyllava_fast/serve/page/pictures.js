// Pictures to send: added, pasted or dropped; shown small; removable.

import { $, button, make, tell } from "./dom.js";

export class Pictures {
  constructor() {
    this.list = []; // {name, data}
    $("add").addEventListener("click", () => $("files").click());
    $("files").addEventListener("change", async () => {
      await this.add([...$("files").files]);
      $("files").value = "";
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
    this.#watchDrops();
  }

  /** Read files and show them. What is no picture is told. */
  async add(files) {
    tell($("notice"), "");
    for (const file of files) {
      if (!file.type.startsWith("image/")) {
        tell($("notice"), `${file.name} is no picture.`);
        continue;
      }
      try {
        this.list.push({ name: file.name, data: await read(file) });
      } catch {
        tell($("notice"), `${file.name} cannot be read.`);
      }
    }
    this.draw();
    $("question").focus();
  }

  /** Put other pictures in their place. */
  set(list) {
    this.list = [...list];
    this.draw();
  }

  draw() {
    $("pictures").hidden = !this.list.length;
    $("pictures").replaceChildren(...this.list.map((picture, index) => make("li", {},
      thumbnail(picture),
      button("×", () => {
        this.list.splice(index, 1);
        this.draw();
        ($("pictures").querySelectorAll("button")[index] ?? $("add")).focus();
      }, { class: "remove", "aria-label": `Remove ${picture.name}` }))));
  }

  #watchDrops() {
    const cover = $("dropping");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      cover.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) cover.hidden = true;
    });
    document.addEventListener("drop", (event) => {
      cover.hidden = true;
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }
}

/** Return a picture as a small image with its file's name as its description. */
export function thumbnail(picture) {
  return make("img", { src: picture.data, alt: picture.name || "picture", title: picture.name });
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
