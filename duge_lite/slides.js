// Pictures in a table that controls index. `DATA`, `CSS` and `ID` are filled in by viewer.py; nothing is fetched.
for (const host of document.querySelectorAll(`[data-duge-slides="${ID}"]`)) {
  if (host.shadowRoot) continue; // the same output may be on the page twice: start each one once
  const kept = DATA.pictures.map((src) => el("img", { src, decoding: "sync" })); // loaded once: nothing flickers
  const at = DATA.controls.map(({ start }) => start), shown = el("div"), said = el("output");
  const tile = (head, [caption, n, share], label) => el("figure", { className: caption ? "small" : "" },
    Object.assign(kept[n].cloneNode(), { alt: caption ? `${head}: ${caption}` : label }),
    ...(share === null ? [] : [el("div", { className: "bar" }, el("i", { style: `width: ${100 * share}%` }))]),
    ...(caption ? [el("figcaption", { textContent: caption })] : []));
  const draw = () => {
    const k = at.reduce((sum, v, i) => sum * DATA.controls[i].values.length + v, 0);
    said.textContent = DATA.labels[k];
    shown.replaceChildren(...DATA.frames[k].map(([head, tiles]) => el("div", { className: "tiles", role: "group", "aria-label": head },
      ...(head ? [el("div", { className: "head", textContent: head })] : []), ...tiles.map((one) => tile(head, one, DATA.labels[k])))));
  };
  const controls = DATA.controls.map(({ name, values, words, start }, i) => {
    const title = el("span", { textContent: name }), value = el("span", { className: "value" });
    if (words) return el("div", { className: "row", role: "radiogroup", "aria-label": name }, title, el("div", { className: "words" },
      ...values.map((text, k) => el("label", {}, el("input", { type: "radio", name: "choice" + i, checked: k === start,
        onchange: () => { at[i] = k; draw(); } }), el("span", { textContent: text })))));
    const input = el("input", { type: "range", min: 0, max: values.length - 1, value: start, "aria-label": name });
    input.oninput = () => {
      at[i] = +input.value;
      draw();
      value.textContent = values[at[i]];
      input.setAttribute("aria-valuetext", values[at[i]] || said.textContent); // a slider alone tells its whole sentence
    };
    input.oninput();
    return el("label", { className: "row" }, title, value, input);
  });
  draw();
  host.attachShadow({ mode: "open" }).append(el("style", { textContent: CSS }), el("section", { "aria-label": DATA.title },
    ...(DATA.title ? [el("h4", { textContent: DATA.title })] : []), ...controls, said, shown));
}
