// A look inside on the screen. Nothing but element, text and canvas: whatever a model says goes in as text.

(() => {
  const make = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === false || value === null || value === undefined) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  };
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const percent = (p) => (p >= 0.9995 ? "100 %" : p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(nothing)";
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const WIDTH = 420;

  /** The density of a map over a picture of w x h cells: values of each input, spread over the box that it shows. */
  function density(values, n, boxes, size, w, h, smooth) {
    const found = new Float32Array(w * h);
    boxes.forEach(([left, top, right, bottom], input) => {
      const area = (right - left) * (bottom - top);
      const at = (x, y) => values[input * n * n + Math.min(n - 1, Math.max(0, y)) * n + Math.min(n - 1, Math.max(0, x))];
      for (let row = 0; row < h; row++) {
        const v = ((row + 0.5) * size[1]) / h;
        if (v < top || v >= bottom) continue;
        const y = (n * (v - top)) / (bottom - top);
        for (let column = 0; column < w; column++) {
          const u = ((column + 0.5) * size[0]) / w;
          if (u < left || u >= right) continue;
          const x = (n * (u - left)) / (right - left);
          let value;
          if (smooth) {
            const [a, b] = [Math.floor(x - 0.5), Math.floor(y - 0.5)];
            const [s, t] = [x - 0.5 - a, y - 0.5 - b];
            value = (1 - t) * ((1 - s) * at(a, b) + s * at(a + 1, b)) + t * ((1 - s) * at(a, b + 1) + s * at(a + 1, b + 1));
          } else value = at(Math.floor(x), Math.floor(y));
          found[row * w + column] += value / area;
        }
      }
    });
    return found;
  }

  /** Colour of a share of the peak: see-through, then violet, orange, yellow. */
  function colour(share) {
    const steps = [[60, 20, 120], [180, 40, 120], [240, 120, 40], [255, 230, 90]];
    const at = Math.min(0.999, share) * 3;
    const [a, b] = [steps[Math.floor(at)], steps[Math.floor(at) + 1]];
    return [...a.map((v, i) => v + (at % 1) * (b[i] - v)), 225 * Math.min(1, 1.6 * share)];
  }

  class View {
    constructor(root, data) {
      this.data = data;
      this.token = -1; // -1: the whole answer
      this.method = data.methods[0].name;
      this.layer = -1;
      this.head = -1;
      this.row = -1; // of the image rows; -1: none is chosen
      this.smooth = false;
      this.chips = make("div", { class: "look-chips", role: "group", "aria-label": "Tokens of the answer" });
      this.controls = make("div", { class: "look-controls" });
      this.note = make("p", { class: "look-note" });
      this.pictures = make("div", { class: "look-pictures" });
      this.about = make("div", { class: "look-about" });
      this.rows = make("div", { class: "look-rows" });
      root.replaceChildren(make("div", { class: "look" },
        make("p", { class: "look-question", dir: "auto" }, data.question), this.chips, this.controls, this.note,
        make("div", { class: "look-sides" }, this.pictures, this.about), this.rows));
      this.drawChips();
      this.images = data.pictures.map((picture) => {
        const image = new Image();
        image.addEventListener("load", () => this.drawPictures());
        image.src = picture.src;
        return image;
      });
      this.draw();
    }

    choose(changes) {
      Object.assign(this, changes);
      this.draw();
    }

    draw() {
      [...this.chips.children].forEach((chip, index) => chip.setAttribute("aria-pressed", String(index - 1 === this.token)));
      this.drawControls();
      this.note.textContent = this.data.methods.find((m) => m.name === this.method).note;
      this.drawPictures();
      this.drawAbout();
      this.drawRows();
    }

    drawChips() {
      const chip = (text, token, sure) => {
        const made = make("button", { type: "button", class: "look-chip", onclick: () => this.choose({ token }) }, text);
        if (sure !== null) made.style.borderBottomColor = `color-mix(in srgb, var(--look-accent) ${100 * sure}%, var(--look-wrong))`;
        return made;
      };
      this.chips.append(chip("whole answer", -1, null),
        ...this.data.tokens.map((t, index) => chip(visible(t.text), index, t.probability)));
    }

    drawControls() {
      const select = (label, options, value, change) => {
        const box = make("select", { onchange: () => change(box.value) }, ...options.map(([v, text]) => new Option(text, v)));
        box.value = value;
        return make("label", {}, `${label} `, box);
      };
      const layers = this.data.layers[this.method];
      const parts = [select("Map", this.data.methods.map((m) => [m.name, m.label]), this.method, (method) => this.choose({ method, layer: -1, head: -1 }))];
      if (layers) {
        parts.push(select("Layer", [[-1, "all"], ...layers.map((_, i) => [i, i + 1])], this.layer, (v) => this.choose({ layer: +v, head: -1 })));
        if (this.layer >= 0) {
          const heads = layers[this.layer].heads;
          parts.push(select("Head", [[-1, "mean"], ...Array.from({ length: heads }, (_, i) => [i, i + 1])], this.head, (v) => this.choose({ head: +v })));
        }
      }
      const smooth = make("input", { type: "checkbox", onchange: (event) => this.choose({ smooth: event.target.checked }) });
      smooth.checked = this.smooth;
      parts.push(make("label", {}, smooth, " smooth"));
      this.controls.replaceChildren(...parts);
    }

    /** {n, values} of a picture's map; those of one layer are each on a scale of its own. */
    map(picture, method) {
      const layers = this.data.layers[method];
      if (layers && this.layer >= 0) {
        const { heads, kept, maps } = layers[this.layer];
        const { n, inputs, data } = maps[picture];
        const [all, size] = [(this.cache ??= new Map()), n * n * inputs];
        if (!all.has(data)) all.set(data, bytes(data));
        const rows = this.data.tokens.length;
        const first = kept ? (this.head < 0 ? 0 : this.head + 1) : 0;
        const tokens = this.token >= 0 ? [this.token] : this.said();
        const values = new Float32Array(size);
        for (const token of tokens) {
          const from = (first * rows + token) * size;
          for (let i = 0; i < size; i++) values[i] += all.get(data)[from + i];
        }
        return { n, values };
      }
      const source = this.token >= 0 ? this.data.tokens[this.token].maps : this.data.answer_maps;
      const { n, peak, data } = source[method][picture];
      return { n, values: Float32Array.from(bytes(data), (value) => value * peak) };
    }

    said() {
      const all = this.data.tokens.map((_, i) => i);
      const some = all.filter((i) => !this.data.tokens[i].ends);
      return some.length ? some : all;
    }

    drawPictures() {
      // what misleads stands beside what mends it
      const shown = this.method === "relative" ? ["relative", "attention"] : [this.method];
      this.pictures.replaceChildren(...shown.flatMap((method) => [
        ...(shown.length > 1 ? [make("p", { class: "look-note" }, this.data.methods.find((m) => m.name === method).label)] : []),
        ...this.canvases(method),
      ]));
    }

    /** The pictures under their maps, on one scale. */
    canvases(method) {
      const all = this.data.pictures.map(({ width, height, boxes }, index) => {
        const scale = WIDTH / Math.max(width, height);
        const [w, h] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
        const { n, values } = this.map(index, method);
        const dense = density(values, n, boxes, [width, height], w, h, this.smooth);
        return { w, h, scale, dense: dense.map((value) => value * width * height) };
      });
      const peak = Math.max(1e-30, ...all.map(({ dense }) => dense.reduce((a, b) => Math.max(a, b), 0)));
      return all.map((one, index) => this.canvas(index, one, peak));
    }

    canvas(index, { w, h, scale, dense }, peak) {
      const { width, height } = this.data.pictures[index];
      const image = this.images[index];
      const canvas = make("canvas", { width: w, height: h, role: "img", "aria-label": `Picture ${index + 1} with its map`,
        onclick: (event) => this.pick(index, (event.offsetX / canvas.clientWidth) * width, (event.offsetY / canvas.clientHeight) * height) });
      const context = canvas.getContext("2d");
      if (image.complete && image.naturalWidth) {
        context.imageSmoothingEnabled = scale < 1;
        context.drawImage(image, 0, 0, w, h);
      }
      const heat = new ImageData(w, h);
      dense.forEach((value, i) => heat.data.set(colour(value / peak), 4 * i));
      const layer = make("canvas", { width: w, height: h });
      layer.getContext("2d").putImageData(heat, 0, 0);
      context.drawImage(layer, 0, 0);
      const center = this.row >= 0 ? this.data.rows.centers[this.row] : null;
      if (center && center[0] === index) {
        context.strokeStyle = "#fff";
        context.lineWidth = 2;
        context.beginPath();
        context.arc(center[1] * scale, center[2] * scale, 7, 0, 7);
        context.stroke();
      }
      return canvas;
    }

    /** Choose the image row whose place is nearest. */
    pick(picture, x, y) {
      const { centers } = this.data.rows;
      let [best, least] = [-1, Infinity];
      centers.forEach(([p, u, v], row) => {
        const far = (u - x) ** 2 + (v - y) ** 2;
        if (p === picture && far < least) [best, least] = [row, far];
      });
      this.choose({ row: best });
    }

    drawAbout() {
      const parts = [];
      if (this.token >= 0) {
        const token = this.data.tokens[this.token];
        parts.push(make("h3", {}, `${visible(token.text)}: ${percent(token.probability)}`),
          make("table", {}, make("tbody", {}, ...token.alternatives.map(([text, p]) => {
            const bar = make("div", { class: "look-bar" });
            bar.style.width = `${100 * p}%`;
            return make("tr", {}, make("td", { dir: "auto" }, visible(text)), make("td", {}, bar), make("td", {}, percent(p)));
          }))));
      }
      const some = this.token >= 0 ? [this.token] : this.said();
      const mean = (name) => some.reduce((sum, i) => sum + this.data.tokens[i].shares[name], 0) / some.length;
      const names = [["image", "image"], ["question", "question and frame"], ["first", "first token (sink)"], ["answer", "answer so far"]];
      parts.push(make("h3", {}, "Attention goes to"), make("table", {}, make("tbody", {}, ...names.map(([name, text]) => {
        const bar = make("div", { class: "look-bar" });
        bar.style.width = `${100 * mean(name)}%`;
        return make("tr", {}, make("td", {}, text), make("td", {}, bar), make("td", {}, percent(mean(name))));
      }))));
      if (this.data.curves) parts.push(...this.curves());
      this.about.replaceChildren(...parts);
    }

    curves() {
      const { at, random } = this.data.curves;
      const own = this.data.curves.maps[this.method];
      const chart = (kind) => {
        const line = (values, name) => svg("polyline", { class: name, points: at.map((x, i) => `${30 + 160 * x},${10 + 90 * (1 - values[i])}`).join(" ") });
        const text = (x, y, said, anchor = "middle") => svg("text", { x, y, "text-anchor": anchor }, said);
        return make("figure", {}, svg("svg", { viewBox: "0 0 200 122", role: "img", "aria-label": `${kind} curve` },
          svg("rect", { x: 30, y: 10, width: 160, height: 90, class: "look-frame" }), line(random[kind], "look-random"), line(own[kind], "look-own"),
          text(26, 14, "1", "end"), text(26, 103, "0", "end"), text(110, 116, kind === "deletion" ? "share replaced" : "share shown")),
        make("figcaption", {}, `${kind}: area ${own[`${kind}_area`].toFixed(3)}; random ${random[`${kind}_area`].toFixed(3)} ± ${random[`${kind}_error`].toFixed(3)}`));
      };
      return [make("h3", {}, "Is it what the answer needs?"), make("div", { class: "look-curves" }, chart("deletion"), chart("insertion")),
        make("p", { class: "look-note" }, "The answer's probability as the most important parts of the picture are replaced (less is better), and as they alone are shown (more is better); pale: in random orders.")];
    }

    drawRows() {
      const { rows, sinks } = this.data;
      const parts = [];
      if (sinks.length) {
        parts.push(make("h3", {}, "Attention sinks"), make("p", { class: "look-note" },
          "Positions of the prompt that take attention, or are long, out of proportion. What raw attention shows there says nothing of the picture."),
        make("table", {}, make("tbody", {}, ...sinks.map((s) => make("tr", {}, make("td", { dir: "auto" }, s.row < 0 ? visible(s.text) : `image row ${s.row + 1}`),
          make("td", {}, `${percent(s.share)} of the attention`), make("td", {}, `${s.norm.toFixed(1)} x the median norm`))))));
      }
      if (this.row < 0) parts.push(make("p", { class: "look-note" }, "Click into a picture: what that image row would be read as after each layer, and which rows are like it."));
      else {
        const like = rows.similarity ? bytes(rows.similarity[this.row]) : null;
        parts.push(make("h3", {}, `Image row ${this.row + 1} of ${rows.centers.length}`),
          make("table", {}, make("tbody", {}, ...rows.lens.map((texts, layer) => make("tr", {}, make("td", {}, `after layer ${layer + 1}`),
            make("td", { dir: "auto" }, visible(texts[this.row])), make("td", {}, percent(rows.probabilities[layer][this.row])))))));
        if (like) {
          const order = [...like.keys()].filter((i) => i !== this.row).sort((a, b) => like[b] - like[a]).slice(0, 6);
          parts.push(make("p", { class: "look-note" }, `Most alike (cosine, centred): ${order.map((i) => `row ${i + 1} ${((like[i] - 127) / 127).toFixed(2)}`).join(", ")}`));
        }
      }
      this.rows.replaceChildren(...parts);
    }
  }

  window.showLook = (root, data) => new View(root, data);
})();
