// @ts-check
// Elements and controls. Text that comes from a model reaches the page through textContent alone.

/** `index` kept inside `count`. */
export const clamp = (index, count) => Math.max(0, Math.min(count - 1, index));

/**
 * An HTML element.
 * @param {string} name
 * @param {Record<string, any>} attributes `text` becomes its text
 * @param {(Node | string)[]} [children]
 * @returns {HTMLElement & Record<string, any>}
 */
export function element(name, { text, ...attributes }, children = []) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

/**
 * An SVG element.
 * @param {string} name
 * @param {Record<string, any>} attributes `text` becomes its text
 * @param {(Node | string)[]} [children]
 * @returns {SVGElement & Record<string, any>}
 */
export function drawn(name, { text, ...attributes }, children = []) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

/** A labelled range input over `values`; `slider.show(index)` moves it without telling `chosen`. */
export function sliderOver(name, values, chosen) {
  const input = element("input", { type: "range", min: 0, max: values.length - 1, step: 1, "aria-label": name });
  const output = element("output", {});
  const slider = element("label", { class: "slider" }, [`${name} `, input, output]);
  slider.show = (index) => {
    input.value = index;
    output.textContent = values[index];
    input.setAttribute("aria-valuetext", `${name} ${values[index]}`);
  };
  input.addEventListener("input", () => { slider.show(Number(input.value)); chosen(Number(input.value)); });
  return slider;
}

/** A labelled select over `values`; `chooser.show(index)` moves it without telling `chosen`. */
export function chooserOf(name, values, chosen) {
  const select = element("select", { "aria-label": name });
  select.append(...values.map((value, i) => element("option", { value: i, text: String(value) })));
  select.addEventListener("change", () => chosen(Number(select.value)));
  const chooser = element("label", {}, [`${name} `, select]);
  chooser.show = (index) => { select.value = index; };
  return chooser;
}

/** Two buttons, back and on, that call `go` with -1 and 1. */
export function stepButtons(what, go) {
  return [["◂", "previous", -1], ["▸", "next", 1]].map(([sign, way, by]) => {
    const button = element("button", { type: "button", class: "step", text: sign, "aria-label": `${way} ${what}` });
    button.addEventListener("click", () => go(by));
    return button;
  });
}

/** Buttons, one an expert; `buttons.show(expert)` presses one without telling `chosen`; -1 is none. */
export function expertButtons(count, chosen) {
  const buttons = Array.from({ length: count }, (_, e) =>
    element("button", { type: "button", class: `expert e${e}`, text: String(e), "aria-pressed": "false", title: `only expert ${e}` }));
  const group = element("span", { class: "experts", role: "group", "aria-label": "show one expert only" }, ["expert ", ...buttons]);
  group.show = (expert) => buttons.forEach((button, e) => button.setAttribute("aria-pressed", String(e === expert)));
  buttons.forEach((button, e) => button.addEventListener("click", () => chosen(e)));
  return group;
}
