const el = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  for (const [k, v] of Object.entries(props)) if (k.includes("-") || k === "role") node.setAttribute(k, v);
  node.append(...children);
  return node;
};
