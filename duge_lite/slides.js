// Pictures in a table that controls index. `DATA`, `CSS` and `ID` are filled in by viewer.py; nothing is fetched.
for (const host of document.querySelectorAll(`[data-duge-slides="${ID}"]`)) {
  if (host.shadowRoot) continue; // the same output may be on the page twice: start each one once
  const el = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    for (const [k, v] of Object.entries(props)) if (k.includes("-") || k === "role") node.setAttribute(k, v);
    node.append(...children);
    return node;
  };
  const kept = DATA.pictures.map((src) => el("img", { src, decoding: "sync" })); // loaded once: nothing flickers
  const at = DATA.controls.map(({ start }) => start), shown = el("div"), said = el("output");
  const draw = () => {
    const k = at.reduce((sum, v, i) => sum * DATA.controls[i].values.length + v, 0);
    said.textContent = DATA.labels[k];
    shown.replaceChildren(...DATA.frames[k].map(([head, tiles]) => el("div", { className: "tiles", role: "group", "aria-label": head },
      ...(head ? [el("div", { className: "head", textContent: head })] : []),
      ...tiles.map(([caption, n, share]) => el("figure", { className: caption ? "small" : "" },
        Object.assign(kept[n].cloneNode(), { alt: caption ? `${head}: ${caption}` : DATA.labels[k] }),
        ...(share === null ? [] : [el("div", { className: "bar" }, el("i", { style: `width: ${100 * share}%` }))]),
        ...(caption ? [el("figcaption", { textContent: caption })] : []))))));
  };
  const controls = DATA.controls.map(({ name, values, words, start }, i) => {
    const value = el("span", { className: "value" });
    const set = (k) => { at[i] = k; draw(); };
    if (words) return el("div", { className: "row", role: "radiogroup", "aria-label": name }, el("span", { textContent: name }),
      el("div", { className: "words" }, ...values.map((text, k) => el("label", {},
        el("input", { type: "radio", name: "choice" + i, checked: k === start, onchange: () => set(k) }), el("span", { textContent: text })))));
    const input = el("input", { type: "range", min: 0, max: values.length - 1, value: start, "aria-label": name });
    const tell = () => { // a slider alone tells its whole sentence
      value.textContent = values[input.value];
      input.setAttribute("aria-valuetext", DATA.controls.length > 1 ? values[input.value] : said.textContent);
    };
    input.oninput = () => { set(+input.value); tell(); };
    queueMicrotask(tell);
    return el("label", { className: "row" }, el("span", { textContent: name }), input, value);
  });
  draw();
  host.attachShadow({ mode: "open" }).append(el("style", { textContent: CSS }), el("section", { "aria-label": DATA.title },
    ...(DATA.title ? [el("h4", { textContent: DATA.title })] : []), ...controls, said, shown));
}
