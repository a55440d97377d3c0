// The attention viewer. `DATA`, `CSS` and `ID` are filled in by viewer.py; nothing is fetched.
const percent = (x) => (100 * x).toFixed(x < 0.0095 ? 2 : x < 0.0995 ? 1 : 0) + " %";
const clamp = (x, lo, hi) => Math.min(hi, Math.max(lo, x));
const average = (map) => map.reduce((a, b) => a + b, 0) / map.length;
const range = (n) => [...Array(n).keys()];
const colors = DATA.colors.match(/.{6}/g);
const rgb = colors.map((hex) => [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16)));
const color = (v) => rgb[Math.round(v * (rgb.length - 1))];

// ---------------------------------------------------------------- numbers out of pictures

const load = (src) => new Promise((resolve, reject) => {
  const onerror = () => reject(new Error("a picture of this viewer is damaged"));
  const image = el("img", { onload: () => resolve(image), onerror, src });
});

async function readLayer({ label, sprite, scale, h, w }, steps) {
  // A grey sprite, one tile per group (down) and step (across) -> shares [step][group][h * w], their mean first.
  const image = await load(sprite);
  const canvas = el("canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data;
  const maps = range(steps).map((s) => scale.map((top, g) => Float32Array.from({ length: h * w }, (_, i) => {
    const x = s * w + i % w, y = g * h + Math.floor(i / w);
    return pixels[4 * (y * image.width + x)] / 255 * top;
  })));
  const mean = maps[0].map((map, g) => map.map((_, i) => average(maps.map((groups) => groups[g][i]))));
  const tops = [mean.map((map) => Math.max(...map)), ...maps.map(() => scale)]; // the steps share one scale
  return { label, h, w, maps: [mean, ...maps], tops };
}

async function readView(view, i, picture) {
  const same = (one, other) => ["text", "nth", "kind"].every((key) => one[key] === other[key]);
  return {
    prompt: view.prompt,
    count: view.steps.length,
    name: DATA.labels[i] && DATA.labels[i] + ": ",
    groups: DATA.views[0].words.map((word) => view.words.findIndex((own) => same(word, own))), // words by name
    pictures: [picture, ...await Promise.all(view.previews.map(load))],
    layers: await Promise.all(view.layers.map((layer) => readLayer(layer, view.steps.length))),
  };
}

// ---------------------------------------------------------------- one viewer

async function start(host) {
  const root = host.attachShadow({ mode: "open" });
  const pictures = host.querySelectorAll("img");
  const views = await Promise.all(DATA.views.map((view, i) => readView(view, i, pictures[i])));
  const [main] = views, [{ words, steps, total, start: first }] = DATA.views, two = views.length === 2;
  const modes = two ? [["both", [0, 1]], ...DATA.labels.map((label, i) => [label, [i]])] : [["", [0]]];
  const state = {
    word: first, step: 0, layer: 0, opacity: 75, smooth: true, special: words[first].kind !== "word",
    shared: false, mode: 0, spot: null, playing: 0, hover: null,
  };

  // -- lookups; the second view follows the first one
  const lit = () => state.hover ?? state.word;
  const listed = () => range(words.length).filter((i) => state.special || words[i].kind === "word");
  const stepOf = (view) => state.step
    && 1 + Math.round((state.step - 1) * (view.count - 1) / Math.max(1, steps.length - 1));
  const layerOf = (view) => view.layers[Math.min(state.layer, view.layers.length - 1)];
  const mapOf = (view, i) => layerOf(view).maps[stepOf(view)][view.groups[i]]; // none where the word is not
  const spotIn = ({ h, w }) => [Math.floor(state.spot.x * w), Math.floor(state.spot.y * h)];
  const valueOf = (view, i) => {
    const map = mapOf(view, i) ?? [0], layer = layerOf(view);
    if (!state.spot) return average(map);
    const [x, y] = spotIn(layer);
    return map[y * layer.w + x] ?? 0;
  };
  const scale = () => {
    const among = state.shared ? listed() : [lit()];
    const tops = views.map((view) => among.map((i) => layerOf(view).tops[stepOf(view)][view.groups[i]] ?? 0));
    return Math.max(1e-6, ...tops.flat());
  };

  // -- the parts
  const set = (changes) => { Object.assign(state, changes); draw(); };
  const choose = (i) => set({ word: i, hover: null });
  const chips = words.map(({ text, kind }, i) => el("button", {
    type: "button", className: "chip " + kind,
    onmouseenter: () => set({ hover: i }), onmouseleave: () => set({ hover: null }),
    onfocus: () => choose(i), onclick: () => choose(i),
  },
  el("span", { className: "text", textContent: text }), el("span", { className: "share" }),
  el("span", { className: "bar" })));

  const slider = (key, label, max, said, hint) => {
    const input = el("input", { type: "range", min: 0, max, value: state[key], "aria-label": label, title: hint });
    input.oninput = () => {
      if (key === "step") stop();
      set({ [key]: +input.value });
    };
    const output = el("output"), name = el("span", { textContent: label });
    return { key, said, input, output, row: el("label", { className: "row" }, name, input, output) };
  };
  const stepName = () => state.step ? `step ${steps[state.step - 1]} of ${total}` : "all steps";
  const layerName = () => layerOf(main).label;
  const sliders = [
    slider("step", "Step", steps.length, stepName, "0: the mean of all steps"),
    slider("layer", "Layer", main.layers.length - 1, layerName, "0: the mean of all layers"),
    slider("opacity", "Opacity", 100, () => state.opacity + " %", "of the map on the picture"),
  ];
  const play = el("button", { type: "button", className: "play", onclick: () => { toggle(); draw(); } });
  sliders[0].row.append(play);

  const check = (key, label, hint) => {
    const input = el("input", { type: "checkbox", checked: state[key] });
    input.onchange = () => {
      state[key] = input.checked;
      set({ word: listed().includes(state.word) ? state.word : first });
    };
    return el("label", { className: "check", title: hint }, input, " " + label);
  };
  const radios = modes.map((_, mode) => el("input", { type: "radio", name: "mode", onchange: () => set({ mode }) }));

  const stages = views.map((view, i) => {
    const { naturalWidth: w, naturalHeight: h } = view.pictures[0], long = 384 / Math.max(w, h);
    const canvas = el("canvas", { role: "img", width: Math.round(w * long), height: Math.round(h * long) });
    canvas.onpointermove = (event) => {
      const box = canvas.getBoundingClientRect();
      const x = clamp((event.clientX - box.left) / box.width, 0, 0.999);
      set({ spot: { view, x, y: clamp((event.clientY - box.top) / box.height, 0, 0.999) } });
    };
    canvas.onpointerleave = () => set({ spot: null });
    const caption = el("figcaption");
    return { view, canvas, caption, figure: el("figure", { className: two ? "of" + i : "" }, canvas, caption) };
  });

  const high = el("span"), trend = el("div", { className: "trend" });
  const said = el("p", { className: "said", role: "status" });
  const keys = "Keys: ← → word · , . step · [ ] layer · p play" + (two ? " · c compare" : "");
  const panel = el("div", { className: "panel" },
    el("div", { className: "modes", hidden: !two, role: "radiogroup", "aria-label": "Which picture" },
      ...radios.map((input, i) => el("label", {}, input, el("span", { textContent: modes[i][0] })))),
    ...sliders.map(({ row }) => row),
    el("div", { className: "checks" },
      check("smooth", "smooth", "off: the cells that the layer really has"),
      check("special", "start, end, padding", "the positions that are no words, and their share of attention"),
      check("shared", "one scale for all words", "off: each word's own largest share is the brightest")),
    el("div", { className: "legend" }, el("span", { textContent: "0" }),
      el("span", { className: "colors", style: `background: linear-gradient(to right, #${colors.join(", #")})` }),
      high, el("span", { textContent: "of a place's attention" })),
    trend, said, el("p", { className: "keys", textContent: keys }));
  const frame = el("section", { className: "viewer", "aria-label": "Attention of: " + main.prompt },
    el("div", { className: "words", role: "toolbar", "aria-label": "Words of the prompt" }, ...chips),
    el("div", { className: "body" },
      el("div", { className: "stages" }, ...stages.map(({ figure }) => figure)), panel),
    el("p", { className: "notes", hidden: !DATA.notes.length, textContent: DATA.notes.join(" ") }));
  root.append(el("style", { textContent: CSS }), frame);

  // -- drawing
  function paint({ view, canvas, caption }, most) {
    const context = canvas.getContext("2d"), picture = view.pictures[stepOf(view)] ?? view.pictures[0];
    context.imageSmoothingEnabled = picture.naturalWidth > 128;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const map = mapOf(view, lit()), { text, kind } = words[lit()], name = kind === "word" ? `“${text}”` : text;
    caption.textContent = view.name + name + (map ? ` gets ${percent(average(map))}` : " is not in this prompt");
    canvas.setAttribute("aria-label", map ? `${view.prompt}. Where ${name} looks, ${stepName()}, ${layerName()}: `
      + `${percent(average(map))} of all attention.` : caption.textContent);
    if (!map) return;
    const { h, w } = layerOf(view), small = el("canvas", { width: w, height: h });
    const data = small.getContext("2d").createImageData(w, h);
    map.forEach((share, i) => { // where nothing is seen, the picture shines through a little more
      const v = clamp(share / most, 0, 1);
      data.data.set([...color(v), 255 * (state.opacity / 100) ** (2 - v)], 4 * i);
    });
    small.getContext("2d").putImageData(data, 0, 0);
    context.imageSmoothingEnabled = state.smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    if (state.spot?.view !== view) return;
    const [x, y] = spotIn(layerOf(view)), [across, down] = [canvas.width / w, canvas.height / h];
    context.lineWidth = 2;
    context.strokeStyle = "#fff";
    context.strokeRect(x * across, y * down, across, down);
  }

  function drawTrend(shown) {
    const word = (view) => layerOf(view).maps.slice(1).map((groups) => groups[view.groups[lit()]]);
    const series = shown.map((k) => word(views[k]).filter(Boolean).map(average)); // empty where the word is not
    const most = Math.max(1e-9, ...series.flat());
    const place = (i, n) => 4 + 192 * (n > 1 ? i / (n - 1) : 0.5), now = place(state.step - 1, steps.length);
    const mark = state.step ? `<line class="mark" x1="${now}" x2="${now}" y1="0" y2="40"/>` : "";
    const lines = series.map((values, i) => {
      const points = values.map((v, k) => `${place(k, values.length)},${37 - 33 * v / most}`);
      return `<polyline class="series${shown[i]}" points="${points.join(" ")}"/>`;
    });
    const drawn = mark + lines.join("");
    trend.innerHTML = `<svg viewBox="0 0 200 40" preserveAspectRatio="none" aria-hidden="true">${drawn}</svg>`
      + `<span class="trendtext">share at each step, at most ${percent(most)}</span>`;
  }

  function draw() {
    for (const { key, said, input, output } of sliders) {
      input.value = state[key];
      output.value = said();
      input.setAttribute("aria-valuetext", output.value);
    }
    play.textContent = state.playing ? "❚❚" : "▶";
    play.title = state.playing ? "Pause" : "Play the steps";
    play.setAttribute("aria-label", play.title);

    const [, shown] = modes[state.mode], order = listed();
    const values = words.map((_, i) => valueOf(state.spot?.view ?? views[shown[0]], i));
    const longest = Math.max(1e-9, ...order.map((i) => values[i]));
    chips.forEach((chip, i) => {
      const share = percent(values[i]);
      chip.hidden = !order.includes(i);
      chip.classList.toggle("lit", i === lit());
      chip.setAttribute("aria-pressed", i === state.word);
      chip.setAttribute("aria-label", `${words[i].text}, ${share}`);
      chip.tabIndex = i === state.word ? 0 : -1;
      chip.children[1].textContent = share;
      chip.children[2].style.width = 100 * values[i] / longest + "%";
    });
    const most = scale();
    high.textContent = percent(most);
    stages.forEach((stage, k) => {
      stage.figure.hidden = !shown.includes(k);
      if (!stage.figure.hidden) paint(stage, most);
    });
    radios.forEach((input, mode) => { input.checked = mode === state.mode; });
    drawTrend(shown);
    const { text } = words[lit()], share = percent(values[lit()]);
    said.textContent = state.spot
      ? `This place gives ${share} of its attention to ${text}; the bars above show all words.`
      : state.playing ? "" : `${text}: ${share} of all attention, ${stepName()}, ${layerName()}.`;
  }

  // -- acting
  function stop() {
    clearInterval(state.playing);
    state.playing = 0;
  }
  function toggle() {
    if (state.playing) return stop();
    if (state.step >= steps.length) state.step = 0;
    state.playing = setInterval(() => {
      if (state.step >= steps.length) stop();
      else state.step += 1;
      draw();
    }, 350);
  }
  const go = (key, by, most) => { state[key] = clamp(state[key] + by, 0, most); };
  const step = (by) => { stop(); go("step", by, steps.length); };
  const move = (by) => {
    const order = listed();
    chips[order[(order.indexOf(state.word) + by + order.length) % order.length]].focus();
  };
  const actions = {
    ",": () => step(-1), ".": () => step(1), p: toggle,
    "[": () => go("layer", -1, main.layers.length - 1), "]": () => go("layer", 1, main.layers.length - 1),
    ...(two && { c: () => { state.mode = (state.mode + 1) % modes.length; } }),
  };
  const onChip = {
    ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-1), ArrowDown: () => move(1),
    Home: () => chips[listed()[0]].focus(), End: () => chips[listed().at(-1)].focus(),
  };
  frame.onkeydown = (event) => {
    const action = actions[event.key] ?? (event.target.classList.contains("chip") && onChip[event.key]);
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    action();
    event.preventDefault();
    event.stopPropagation();
    draw();
  };

  // -- dark or light: as the page really is, whoever painted it
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => {
    const said = `${document.body.className} ${document.documentElement.getAttribute("theme")}`;
    let dark = /vscode-dark|\bdark\b/.test(said) || system.matches;
    for (let node = host; node; node = node.parentElement) {
      const painted = getComputedStyle(node).backgroundColor, unit = painted.startsWith("color(") ? 255 : 1;
      const [r, g, b, a = 1] = (painted.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
      if (a <= 0.5) continue;
      dark = unit * (0.299 * r + 0.587 * g + 0.114 * b) < 128;
      break;
    }
    frame.classList.toggle("dark", dark);
  };
  // It follows the page while it is on it; a notebook may take it off and put it back.
  const watch = document.createElement("duge-watch"), observer = new MutationObserver(theme);
  watch.come = () => {
    for (const part of [document.documentElement, document.body]) observer.observe(part, { attributes: true });
    system.addEventListener("change", theme);
    theme();
  };
  watch.go = () => { stop(); observer.disconnect(); system.removeEventListener("change", theme); };
  frame.append(watch);
  draw();
}

if (!customElements.get("duge-watch")) customElements.define("duge-watch", class extends HTMLElement {
  connectedCallback() { this.come(); }
  disconnectedCallback() { this.go(); }
});

for (const host of document.querySelectorAll(`[data-duge="${ID}"]`)) {
  if (host.shadowRoot) continue; // the same output may be on the page twice: start each one once
  start(host).catch((error) => {
    (host.shadowRoot ?? host).append(el("p", { textContent: "The viewer could not start: " + error.message }));
  });
}
