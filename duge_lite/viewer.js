// The attention viewer. `DATA`, `CSS` and `ID` are filled in by viewer.py; nothing is fetched.
(() => {
  "use strict";
  const percent = (x) => (100 * x).toFixed(x < 0.0095 ? 2 : x < 0.0995 ? 1 : 0) + " %";
  const clamp = (x, lo, hi) => Math.min(hi, Math.max(lo, x));

  // ---------------------------------------------------------------- numbers out of pictures

  const load = (src) => new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("a picture of this viewer is damaged"));
    image.src = src;
  });

  async function readLayer(layer, steps) {
    // A grey sprite, one tile per group (down) and step (across) -> shares, [step][group][h * w].
    const image = await load(layer.sprite);
    const canvas = el("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    const { h, w } = layer;
    const maps = [];
    for (let s = 0; s < steps; s++) {
      maps.push(layer.scale.map((scale, g) => Float32Array.from({ length: h * w }, (_, i) => {
        const x = s * w + (i % w), y = g * h + Math.floor(i / w);
        return pixels[4 * (y * image.width + x)] / 255 * scale;
      })));
    }
    const mean = layer.scale.map((_, g) => Float32Array.from({ length: h * w },
      (_, i) => maps.reduce((sum, groups) => sum + groups[g][i], 0) / steps));
    return { ...layer, maps, mean };
  }

  const average = (map) => map.reduce((a, b) => a + b, 0) / map.length;

  // ---------------------------------------------------------------- one viewer

  async function start(host) {
    const root = host.attachShadow({ mode: "open" });
    const pictures = [...host.querySelectorAll("img")];
    const views = await Promise.all(DATA.views.map(async (view, i) => ({
      ...view,
      picture: pictures[i],
      previews: await Promise.all(view.previews.map(load)),
      layers: await Promise.all(view.layers.map((l) => readLayer(l, view.steps.length))),
    })));
    const two = views.length === 2;
    const main = views[0];
    const state = {
      word: main.start, step: 0, layer: 0, opacity: 75, smooth: true,
      special: !main.words.some((w) => w.kind === "word"),
      shared: false, mode: two ? "both" : "0", spot: null, playing: 0, hover: null,
    };
    const shownWord = () => state.hover ?? state.word;

    // -- lookups; the second view follows the first one's word by name
    const find = (view, index) => {
      const word = main.words[index];
      return view === main ? index
        : view.words.findIndex((w) => w.text === word.text && w.nth === word.nth && w.kind === word.kind);
    };
    const stepOf = (view) => clamp(Math.round((state.step - 1) * (view.steps.length - 1)
      / Math.max(1, main.steps.length - 1)), 0, view.steps.length - 1);
    const layerOf = (view) => view.layers[Math.min(state.layer, view.layers.length - 1)];
    const mapOf = (view, index) => {
      const layer = layerOf(view);
      const group = find(view, index);
      if (group < 0) return null;
      return state.step === 0 ? layer.mean[group] : layer.maps[stepOf(view)][group];
    };
    const top = () => {
      let most = 1e-6;
      for (const view of views) {
        const words = state.shared
          ? main.words.map((w, i) => i).filter((i) => main.words[i].kind === "word" || state.special)
          : [shownWord()];
        for (const i of words) {
          const group = find(view, i);
          if (group < 0) continue;
          const { mean, scale } = layerOf(view); // the steps share one scale; their mean has its own
          most = Math.max(most, state.step === 0 ? Math.max(...mean[group]) : scale[group]);
        }
      }
      return most;
    };

    // -- the parts
    const chips = main.words.map((word, i) => el("button", {
      type: "button", className: "chip " + word.kind, tabIndex: i === state.word ? 0 : -1,
      onmouseenter: () => { state.hover = i; draw(); },
      onmouseleave: () => { state.hover = null; draw(); },
      onfocus: () => choose(i),
      onclick: () => choose(i),
    }, el("span", { className: "text", textContent: word.text }), el("span", { className: "share" }),
    el("span", { className: "bar" })));
    const words = el("div", { className: "words", role: "toolbar", "aria-label": "Words of the prompt" }, ...chips);

    const slider = (label, min, max, value, hint) => {
      const input = el("input", { type: "range", min, max, value, "aria-label": label, title: hint });
      const output = el("output");
      const row = el("label", { className: "row" }, el("span", { textContent: label }), input, output);
      return { row, input, output };
    };
    const step = slider("Step", 0, main.steps.length, 0, "0: the mean of all steps");
    const layer = slider("Layer", 0, main.layers.length - 1, 0, "0: the mean of all layers");
    const opacity = slider("Opacity", 0, 100, state.opacity, "of the map on the picture");
    step.input.oninput = () => { stop(); state.step = +step.input.value; draw(); };
    layer.input.oninput = () => { state.layer = +layer.input.value; draw(); };
    opacity.input.oninput = () => { state.opacity = +opacity.input.value; draw(); };
    const play = el("button", { type: "button", className: "play", onclick: () => toggle() });
    step.row.append(play);

    const check = (label, key, hint) => {
      const input = el("input", { type: "checkbox", checked: state[key] });
      input.onchange = () => {
        state[key] = input.checked;
        if (!state.special && main.words[state.word].kind !== "word") state.word = main.start;
        draw();
      };
      return el("label", { className: "check", title: hint }, input, " " + label);
    };
    const checks = el("div", { className: "checks" },
      check("smooth", "smooth", "off: the cells that the layer really has"),
      check("start, end, padding", "special", "the positions that are no words, and their share of attention"),
      check("one scale for all words", "shared", "off: each word's own largest share is the brightest"));

    const modes = el("div", { className: "modes", role: "radiogroup", "aria-label": "Which picture" });
    const choices = [["both", "both"], ...DATA.labels.map((label, i) => [String(i), label])];
    for (const [value, label] of two ? choices : []) {
      const input = el("input", { type: "radio", name: "mode", value, checked: value === state.mode });
      input.onchange = () => { state.mode = value; draw(); };
      modes.append(el("label", {}, input, el("span", { textContent: label })));
    }

    const stages = views.map((view, i) => {
      const canvas = el("canvas", { role: "img", "aria-label": "" });
      const long = 384 / Math.max(view.picture.naturalWidth, view.picture.naturalHeight);
      canvas.width = Math.round(view.picture.naturalWidth * long);
      canvas.height = Math.round(view.picture.naturalHeight * long);
      canvas.onpointermove = (event) => {
        const box = canvas.getBoundingClientRect();
        state.spot = { x: clamp((event.clientX - box.left) / box.width, 0, 0.999),
          y: clamp((event.clientY - box.top) / box.height, 0, 0.999), view };
        draw();
      };
      canvas.onpointerleave = () => { state.spot = null; draw(); };
      const caption = el("figcaption");
      return { view, canvas, caption, figure: el("figure", { className: two ? "of" + i : "" }, canvas, caption), label: two ? DATA.labels[i] : "" };
    });

    const bar = el("canvas", { className: "colors", width: 256, height: 1 });
    const low = el("span", { textContent: "0" });
    const high = el("span");
    const legend = el("div", { className: "legend" }, low, bar, high, el("span", { className: "unit", textContent: "of a place's attention" }));
    const NS = "http://www.w3.org/2000/svg";
    const line = document.createElementNS(NS, "svg");
    line.setAttribute("viewBox", "0 0 200 40");
    line.setAttribute("preserveAspectRatio", "none");
    line.setAttribute("aria-hidden", "true");
    const trend = el("div", { className: "trend" }, line, el("span", { className: "trendtext" }));
    const said = el("p", { className: "said", role: "status" });
    const keys = el("p", { className: "keys", textContent:
      "Keys: ← → word · , . step · [ ] layer · p play" + (two ? " · c compare" : "") });

    const panel = el("div", { className: "panel" }, ...(two ? [modes] : []), step.row, layer.row, opacity.row,
      checks, legend, trend, said, keys);
    const frame = el("section", { className: "viewer", "aria-label": "Attention of: " + main.prompt },
      words, el("div", { className: "body" }, el("div", { className: "stages" }, ...stages.map((s) => s.figure)), panel),
      ...(DATA.notes.length ? [el("p", { className: "notes", textContent: DATA.notes.join(" ") })] : []));
    root.append(el("style", { textContent: CSS }), frame);

    // -- drawing
    const colors = DATA.colors.match(/.{6}/g).map((hex) => [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16)));
    const color = (v) => colors[Math.round(clamp(v, 0, 1) * (colors.length - 1))];
    const ramp = bar.getContext("2d").createImageData(256, 1);
    for (let i = 0; i < 256; i++) ramp.data.set([...color(i / 255), 255], 4 * i);
    bar.getContext("2d").putImageData(ramp, 0, 0);

    function paint(stage, most) {
      const { view, canvas } = stage;
      const context = canvas.getContext("2d");
      const picture = state.step > 0 && view.previews.length ? view.previews[stepOf(view)] : view.picture;
      context.globalAlpha = 1;
      context.imageSmoothingEnabled = picture.naturalWidth > 128;
      context.drawImage(picture, 0, 0, canvas.width, canvas.height);
      const map = mapOf(view, shownWord());
      const word = main.words[shownWord()];
      const name = word.kind === "word" ? `“${word.text}”` : word.text;
      if (!map) {
        stage.caption.textContent = `${stage.label}: ${name} is not in this prompt`;
        canvas.setAttribute("aria-label", stage.caption.textContent);
        return;
      }
      const { h, w } = layerOf(view);
      const small = el("canvas", { width: w, height: h });
      const data = small.getContext("2d").createImageData(w, h);
      const o = state.opacity / 100; // where nothing is seen, the picture shines through a little more
      for (let i = 0; i < h * w; i++) {
        const v = clamp(map[i] / most, 0, 1);
        data.data.set([...color(v), 255 * o ** (2 - v)], 4 * i);
      }
      small.getContext("2d").putImageData(data, 0, 0);
      context.imageSmoothingEnabled = state.smooth;
      context.imageSmoothingQuality = "high";
      context.drawImage(small, 0, 0, canvas.width, canvas.height);
      context.globalAlpha = 1;
      if (state.spot && state.spot.view === view) {
        const x = Math.floor(state.spot.x * w), y = Math.floor(state.spot.y * h);
        context.lineWidth = 2;
        context.strokeStyle = "#fff";
        context.strokeRect(x * canvas.width / w, y * canvas.height / h, canvas.width / w, canvas.height / h);
      }
      stage.caption.textContent = `${stage.label ? stage.label + ": " : ""}${name} gets ${percent(average(map))}`;
      canvas.setAttribute("aria-label",
        `${view.prompt}. Where ${name} looks, ${step.output.value}, ${layer.output.value}: `
        + `${percent(average(map))} of all attention.`);
    }

    function valueAt(view, index) {
      const map = mapOf(view, index);
      if (!map || !state.spot) return map ? average(map) : 0;
      const { h, w } = layerOf(view);
      return map[Math.floor(state.spot.y * h) * w + Math.floor(state.spot.x * w)];
    }

    function drawTrend() {
      const series = views.filter((v, i) => state.mode === "both" || state.mode === String(i)).map((view) => {
        const group = find(view, shownWord());
        return group < 0 ? [] : layerOf(view).maps.map((maps) => average(maps[group]));
      });
      const most = Math.max(1e-9, ...series.flat());
      line.replaceChildren();
      const place = (i, n) => 4 + 192 * (n > 1 ? i / (n - 1) : 0.5);
      if (state.step > 0) {
        const mark = document.createElementNS(NS, "line");
        const x = place(state.step - 1, main.steps.length);
        for (const [k, v] of [["x1", x], ["x2", x], ["y1", 0], ["y2", 40], ["class", "mark"]]) mark.setAttribute(k, v);
        line.append(mark);
      }
      series.forEach((values, i) => {
        const path = document.createElementNS(NS, "polyline");
        path.setAttribute("points", values.map((v, k) => `${place(k, values.length)},${37 - 33 * v / most}`).join(" "));
        path.setAttribute("class", "series" + (state.mode === "both" ? i : state.mode));
        line.append(path);
      });
      trend.lastChild.textContent = `share at each step, at most ${percent(most)}`;
    }

    function draw() {
      const s = state.step;
      step.input.value = s;
      layer.input.value = state.layer;
      step.output.value = s === 0 ? "all steps" : `step ${main.steps[s - 1].index} of ${main.total}`;
      layer.output.value = layerOf(main).label;
      opacity.output.value = state.opacity + " %";
      for (const control of [step, layer, opacity]) control.input.setAttribute("aria-valuetext", control.output.value);
      play.textContent = state.playing ? "❚❚" : "▶";
      play.setAttribute("aria-label", state.playing ? "Pause" : "Play the steps");
      play.title = play.getAttribute("aria-label");

      const spotted = state.spot ? state.spot.view
        : views[state.mode === "1" ? 1 : 0];
      const values = main.words.map((_, i) => valueAt(spotted, i));
      const among = values.filter((_, i) => state.special || main.words[i].kind === "word");
      const longest = Math.max(1e-9, ...among);
      chips.forEach((chip, i) => {
        const lit = i === shownWord();
        chip.hidden = main.words[i].kind !== "word" && !state.special;
        chip.classList.toggle("lit", lit);
        chip.setAttribute("aria-pressed", String(i === state.word));
        chip.setAttribute("aria-label", `${main.words[i].text}, ${percent(values[i])}`);
        chip.tabIndex = i === state.word ? 0 : -1;
        chip.children[1].textContent = percent(values[i]);
        chip.children[2].style.width = 100 * values[i] / longest + "%";
      });
      const most = top();
      high.textContent = percent(most);
      stages.forEach((stage, i) => {
        stage.figure.hidden = state.mode !== "both" && state.mode !== String(i);
        if (!stage.figure.hidden) paint(stage, most);
      });
      for (const input of modes.querySelectorAll("input")) input.checked = input.value === state.mode;
      drawTrend();
      const word = main.words[shownWord()].text;
      said.textContent = state.spot
        ? `This place gives ${percent(valueAt(state.spot.view, shownWord()))} of its attention to ${word}; the bars above show all words.`
        : state.playing ? "" : `${word}: ${percent(values[shownWord()])} of all attention, ${step.output.value}, ${layer.output.value}.`;
    }

    // -- acting
    function choose(i) { state.word = i; state.hover = null; draw(); }
    function stop() { clearInterval(state.playing); state.playing = 0; }
    function toggle() {
      if (state.playing) { stop(); draw(); return; }
      if (state.step >= main.steps.length) state.step = 0;
      state.playing = setInterval(() => {
        if (state.step >= main.steps.length) stop();
        else state.step += 1;
        draw();
      }, 350);
      draw();
    }
    const visible = () => chips.map((_, i) => i).filter((i) => !chips[i].hidden);
    const move = (by) => {
      const order = visible();
      chips[order[(order.indexOf(state.word) + by + order.length) % order.length]].focus();
    };
    const cycle = () => {
      const order = choices.map(([value]) => value);
      state.mode = order[(order.indexOf(state.mode) + 1) % order.length];
    };
    frame.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const onChip = event.target.classList.contains("chip");
      const actions = {
        ",": () => { stop(); state.step = Math.max(0, state.step - 1); },
        ".": () => { stop(); state.step = Math.min(main.steps.length, state.step + 1); },
        "[": () => { state.layer = Math.max(0, state.layer - 1); },
        "]": () => { state.layer = Math.min(main.layers.length - 1, state.layer + 1); },
        p: toggle,
        ...(two ? { c: cycle } : {}),
        ...(onChip ? { ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-1),
          ArrowDown: () => move(1), Home: () => chips[visible()[0]].focus(),
          End: () => chips[visible().at(-1)].focus() } : {}),
      };
      if (!actions[event.key]) return;
      actions[event.key]();
      event.preventDefault();
      event.stopPropagation();
      draw();
    });

    // -- dark or light: as the page really is, whoever painted it
    const theme = () => {
      let node = host, rgb = null;
      while (node && !rgb) {
        const painted = getComputedStyle(node).backgroundColor;
        const [r, g, b, a = 1] = (painted.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
        const unit = painted.startsWith("color(") ? 255 : 1;
        if (a > 0.5) rgb = [r * unit, g * unit, b * unit];
        node = node.parentElement;
      }
      const said = `${document.body.className} ${document.documentElement.getAttribute("theme")}`;
      const dark = rgb ? 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 128
        : /vscode-dark|\bdark\b/.test(said) || matchMedia("(prefers-color-scheme: dark)").matches;
      frame.classList.toggle("dark", dark);
    };
    // It follows the page while it is on it; a notebook may take it off and put it back.
    const watch = document.createElement("duge-watch");
    const page = matchMedia("(prefers-color-scheme: dark)"), observer = new MutationObserver(theme);
    watch.come = () => {
      for (const part of [document.documentElement, document.body]) observer.observe(part, { attributes: true });
      page.addEventListener("change", theme);
      theme();
    };
    watch.go = () => { stop(); observer.disconnect(); page.removeEventListener("change", theme); };
    frame.append(watch);
    draw();
  }

  if (!customElements.get("duge-watch")) customElements.define("duge-watch", class extends HTMLElement {
    connectedCallback() { this.come(); }
    disconnectedCallback() { this.go(); }
  });

  // The same output may be on the page twice (a second view of it): start each one once.
  for (const host of document.querySelectorAll(`[data-duge="${ID}"]`)) {
    if (host.shadowRoot) continue;
    start(host).catch((error) => {
      const shown = host.shadowRoot || host;
      shown.append(el("p", { textContent: "The viewer could not start: " + error.message }));
    });
  }
})();
