/* The page docs/live.md: a form, and a worker that draws. */

/* Runs in the worker, or in the page where a browser allows none. Takes requests one at a time, answers by `say`. */
function dugeHost(makeEngine, say, plain) {
  const engine = makeEngine(plain);
  const known = {}, drawn = new Map(); // what was solved and drawn before
  const breathe = () => new Promise((done) => setTimeout(done));
  async function solve(names) {
    const key = [...names].sort().join();
    if (!known[key]) {
      const work = engine.forget(names);
      for (let n = 1, step = work.next(); ; n++, step = work.next()) {
        if (step.done) { known[key] = step.value; break; }
        say({ layer: n });
        await breathe();
      }
    }
    return known[key];
  }
  const requests = {
    model({ data, ...about }) { engine.load(data); engine.setTokenizer(about); },
    book({ data, ...about }) { engine.setBook({ about, states: data }); },
    check(prompt) { return engine.unknown(prompt); },
    async draw({ prompt, seed, steps, guidance, forget }) {
      const started = Date.now(), models = [{ names: [], weights: null }];
      if (forget.length) models.push({ names: forget, weights: await solve(forget) });
      const solved = Date.now() - started;
      if (drawn.size > 40) drawn.clear();
      for (const model of models) {
        const key = JSON.stringify([prompt, seed, steps, model.names]);
        if (!drawn.has(key)) drawn.set(key, []);
        model.pictures = drawn.get(key);
        if (model.pictures.length < steps) { model.pictures.length = 0; model.drawing = engine.sample(prompt, seed, steps, guidance); }
      }
      for (let step = 1; step <= steps; step++) for (const [which, { weights, pictures, drawing }] of models.entries()) {
        if (drawing) { // step by step in turn, each with its own weights
          engine.use(weights);
          const { clean, maps } = drawing.next().value;
          pictures.push([engine.decode(clean), maps]);
          await breathe();
        }
        const [picture, maps] = pictures[step - 1];
        say({ picture, maps, which, step });
      }
      return { solved, ms: Date.now() - started, means: engine.means() };
    },
  };
  let last = Promise.resolve();
  return ({ id, kind, data }) => {
    last = last.then(async () => {
      try { say({ id, answer: await requests[kind](data) }); } catch (error) { say({ id, error: error.message }); }
    });
  };
}

(function () {
  "use strict";
  const page = document.querySelector("[data-duge-live]");
  const folder = document.currentScript.src.replace(/[^/]*$/, "");
  const find = (selector) => page.querySelector(selector);
  const status = find("output"), form = find("form"), button = find("button[type=submit]"), shown = find(".live-pictures"), bar = find("progress");
  const tell = (text) => { status.textContent = text; };

  // ---- the worker
  const waiting = new Map();
  let post = null, seen = () => {}, count = 0;
  function hear({ id, answer, error, ...news }) {
    if (id === undefined) return seen(news);
    const { done, fail } = waiting.get(id);
    waiting.delete(id);
    if (error) fail(Error(error)); else done(answer);
  }
  function start() {
    const inPage = () => { const host = dugeHost(dugeEngine, (m) => setTimeout(hear, 0, m), page.dataset.plain === "1"); post = host; };
    try {
      const source = `const host = (${dugeHost})(${dugeEngine}, postMessage.bind(self), ${page.dataset.plain === "1"}); onmessage = (e) => host(e.data);`;
      const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      post = (message) => worker.postMessage(message);
      worker.onmessage = (e) => hear(e.data);
      worker.onerror = (e) => { waiting.forEach(({ fail }) => fail(Error(e.message || "The worker did not start."))); waiting.clear(); };
    } catch (error) { inPage(); }
  }
  const ask = (kind, data) => new Promise((done, fail) => { waiting.set(++count, { done, fail }); post({ id: count, kind, data }); });
  const script = (name) => new Promise((done, fail) => {
    const tag = document.createElement("script");
    tag.src = folder + name + ".js";
    tag.onload = () => { const about = window.dugeLive[name]; delete window.dugeLive[name]; tag.remove(); done(about); };
    tag.onerror = () => fail(Error(`${name}.js is missing beside this page: build the book with "make book".`));
    document.head.append(tag);
  });
  const loaded = {};
  const need = (name) => (loaded[name] ||= script(name).then((about) => ask(name, about)).catch((e) => { delete loaded[name]; throw e; }));

  // ---- what is to go
  const boxes = [...page.querySelectorAll("[name=gone]")];
  const gone = () => boxes.filter((box) => box.checked).map((box) => box.value);
  page.querySelectorAll("[data-set]").forEach((set) => set.addEventListener("click", () => {
    const names = set.dataset.set.split(",");
    boxes.forEach((box) => { box.checked = names.includes(box.value); });
    countGone();
  }));
  function countGone() {
    const names = gone(), few = names.length < 4 ? names.join(", ") : `${names.slice(0, 3).join(", ")} and ${names.length - 3} more`;
    find("[data-gone]").textContent = names.length ? few : "nothing";
    page.querySelectorAll("[data-set]").forEach((set) => set.setAttribute("aria-pressed", String([...names].sort().join() === set.dataset.set.split(",").filter(Boolean).sort().join())));
  }
  boxes.forEach((box) => box.addEventListener("change", countGone));
  page.querySelectorAll("[data-prompt]").forEach((chip) => chip.addEventListener("click", () => { form.elements.prompt.value = chip.dataset.prompt; }));
  countGone();

  // ---- drawing
  function frame(title, prompt, steps) {
    const figure = document.createElement("figure"), big = document.createElement("canvas"), strip = document.createElement("div");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    const words = document.createElement("div");
    strip.className = "live-strip";
    words.className = "live-words";
    figure.append(caption, big, strip, words);
    shown.append(figure);
    big.width = big.height = 64;
    big.setAttribute("role", "img");
    return (pixels, step, maps) => {
      const small = document.createElement("canvas");
      small.width = small.height = 64;
      small.setAttribute("aria-hidden", "true");
      small.title = `step ${step}`;
      strip.append(small);
      for (const canvas of [big, small]) canvas.getContext("2d").putImageData(new ImageData(pixels, 64, 64), 0, 0);
      big.setAttribute("aria-label", `${prompt}, ${title}, step ${step} of ${steps}`);
      const parking = new Set("a an the of to in on and next".split(" ")); // they are parking places, and would outshine all others
      const told = Object.entries(maps).filter(([word]) => !parking.has(word));
      const most = Math.max(...told.map(([, map]) => Math.max(...map))); // one scale for all words
      words.replaceChildren(...told.map(([word, map]) => heat(word, map, most, pixels)));
    };
  }

  function heat(word, map, most, pixels) { // the picture in grey, and in orange where the word was listened to
    const tile = document.createElement("span"), canvas = document.createElement("canvas"), out = new Uint8ClampedArray(pixels);
    for (let i = 0; i < 4096; i++) {
      const hot = (0.9 * map[16 * (i >> 8) + ((i & 63) >> 2)]) / most;
      const grey = 0.3 * pixels[4 * i] + 0.59 * pixels[4 * i + 1] + 0.11 * pixels[4 * i + 2];
      [255, 120, 0].forEach((colour, k) => { out[4 * i + k] = grey * (1 - hot) + colour * hot; });
    }
    canvas.width = canvas.height = 64;
    canvas.getContext("2d").putImageData(new ImageData(out, 64, 64), 0, 0);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `where "${word}" is listened to: at most ${(100 * Math.max(...map)).toFixed(0)} % of a place's attention`);
    tile.append(canvas, word);
    return tile;
  }

  async function draw() {
    const { prompt, seed, steps } = form.elements, text = prompt.value.trim(), names = gone(), count = Number(steps.value);
    const first = Number(seed.value);
    if (!Number.isInteger(first) || first < 0 || first > 4294967295) return tell("The seed has to be a whole number from 0 to 4294967295.");
    tell("Loading the model ...");
    if (!post) start();
    await need("model");
    const strange = await ask("check", text);
    prompt.setAttribute("aria-invalid", String(strange.length > 0));
    if (strange.length) {
      find("[data-words]").open = true;
      return tell(`The model never read ${strange.map((w) => `"${w}"`).join(", ")}. All words that it knows are listed below.`);
    }
    if (names.length) { tell("Loading what the layers saw ..."); await need("book"); }
    shown.replaceChildren();
    const frames = [frame("base model", text, count)];
    if (names.length) frames.push(frame("after forgetting " + find("[data-gone]").textContent, text, count));
    tell(names.length ? "Forgetting, then drawing ..." : "Drawing ...");
    bar.max = count + (names.length ? 7 : 0);
    bar.value = 0;
    bar.hidden = false;
    seen = ({ layer, picture, maps, which, step }) => {
      if (layer || which === 0) bar.value = layer || step + (names.length ? 7 : 0);
      if (picture) frames[which](picture, step, maps);
    };
    const took = await ask("draw", { prompt: text, seed: first, steps: count, guidance: 4, forget: names });
    const solved = took.solved > 50 ? `, ${(took.solved / 1000).toFixed(1)} of them to forget` : "";
    tell(`Done in ${(took.ms / 1000).toFixed(1)} seconds${solved} (${took.means}).`);
    page.dataset.ms = took.ms;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return; // not `disabled`: it would lose the focus
    button.setAttribute("aria-disabled", "true");
    delete page.dataset.ms;
    draw().catch((error) => tell(error.message)).finally(() => { button.setAttribute("aria-disabled", "false"); bar.hidden = true; });
  });
})();
