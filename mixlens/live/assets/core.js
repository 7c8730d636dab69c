// Live views of mixlens: plain ES code for notebooks, saved pages, the report and anywidget. No request, no library.
// show/live.py joins the files that a view needs into one module. Text that comes from a model reaches the page
// through textContent alone.

const VIEWS = {};
const TYPES = { uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array };
const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#:%/()*+-;,=.?@^_[{|}~";

/** Bytes of base-85 text: five digits hold four bytes, most significant first. */
function bytesOf(text) {
  const value = new Uint8Array(128);
  for (let i = 0; i < 85; i++) value[DIGITS.charCodeAt(i)] = i;
  const groups = Math.ceil(text.length / 5);
  const bytes = new DataView(new ArrayBuffer(4 * groups));
  for (let group = 0; group < groups; group++) {
    let number = 0;
    for (let i = 5 * group; i < 5 * group + 5; i++) number = number * 85 + (i < text.length ? value[text.charCodeAt(i)] : 84);
    bytes.setUint32(4 * group, number);
  }
  return new Uint8Array(bytes.buffer, 0, Math.floor((text.length * 4) / 5));
}

/** Header and arrays that show/packing.py packed. */
export async function unpack(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = await new Response(stream).arrayBuffer();
  const length = new DataView(raw).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(raw, 4, length)));
  const arrays = {};
  for (const [name, [type, shape, offset]] of Object.entries(header.arrays)) {
    const size = shape.reduce((a, b) => a * b, 1);
    arrays[name] = new TYPES[type](raw, 4 + length + offset, size);
  }
  return { ...header, arrays, shapes: header.arrays };
}

/** Put the live view of `kind` into the shadow root of `host`, over its static content, unless `free` says no by then. */
export async function mount(host, kind, packed, free = () => true) {
  const data = await unpack(packed);
  if (!await free()) return;
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const frame = element("div", { class: "frame" });
  leave(host); // what an earlier view of this host listens to on the page
  host.leaving = new AbortController();
  frame.gone = host.leaving.signal;
  forgotten.register(frame, host.leaving);
  followTheme(frame);
  root.replaceChildren(element("style", { text: CSS + expertRules(data.colours ?? []) + shadeRules() }), frame);
  if (data.title) frame.append(element("h3", { text: data.title }));
  try {
    VIEWS[kind](frame, data);
  } catch (error) {
    leave(host);
    root.replaceChildren(element("slot", {})); // the static content
    throw error;
  }
  const table = host.querySelector(":scope > table");
  if (table) frame.append(element("details", {}, [element("summary", { text: "As a table" }), table.cloneNode(true)]));
  keepKeys(frame);
  host.dataset.ready = "1";
}

const leave = (host) => host.leaving?.abort();

// Nothing tells a view that a notebook replaced its output. What the page calls is held by the frame alone, so that a
// frame that is nowhere any more goes, and its data with it; then its listeners go too.
const forgotten = new FinalizationRegistry((leaving) => leaving.abort());

function heldBy(frame, call) {
  (frame.held ??= []).push(call);
  return weakly(new WeakRef(call));
}

// In no function that knows the frame: closures made in one place hold what any of them needs.
const weakly = (held) => (...told) => held.deref()?.(...told);

/** The form for anywidget: what is selected in any view of the page is the widget's `selection`. */
export default {
  async render({ model, el }) {
    const host = element("div", { class: "mixlens" });
    el.append(host);
    let disposed = false, released; // a click is lost when its button is replaced between press and release
    host.addEventListener("pointerdown", ({ button }) => {
      if (button !== 0) return; // a context menu takes the release
      const ended = new AbortController();
      released = new Promise((done) => {
        const end = () => { ended.abort(); setTimeout(done); };
        for (const name of ["pointerup", "pointercancel"]) addEventListener(name, end, { signal: ended.signal });
      });
    });
    const free = async () => { await released; return !disposed; };
    const tell = (selection) => document.dispatchEvent(new CustomEvent(CHANNEL, { detail: { ...selection, from: model } }));
    let placed = 0; // where a text that grows was scrolled to; it is followed until the reader scrolls back
    const show = async () => {
      const before = model.get("kind") === "tokens" && host.shadowRoot?.querySelector(".text");
      const top = before && before.scrollTop;
      await mount(host, model.get("kind"), model.get("packed"), free);
      if (disposed) return;
      if (before) {
        const text = host.shadowRoot.querySelector(".text"), back = top < placed - 60;
        text.classList.add("whole");
        const place = () => { text.scrollTop = back ? top : text.scrollHeight; placed = back ? placed : text.scrollTop; };
        place();
        requestAnimationFrame(place); // blocks that came near have their spans by then
      }
      if (Object.keys(model.get("selection")).length) tell(model.get("selection")); // new data, same layer and expert
    };
    await show();
    const hear = ({ detail: { from, ...selection } }) => {
      if (from === model) return;
      model.set("selection", { ...model.get("selection"), ...selection });
      model.save_changes();
    };
    document.addEventListener(CHANNEL, hear);
    const asked = () => tell(model.get("asked"));
    model.on("change:asked", asked);
    model.on("change:packed", show);
    return () => {
      disposed = true;
      document.removeEventListener(CHANNEL, hear);
      model.off("change:asked", asked);
      model.off("change:packed", show);
      leave(host);
    };
  },
};

// ---------------------------------------------------------------------------------------------- linked views

const CHANNEL = "mixlens-select";

/** Hear what other views on the page select, by apply({layer, expert, domain}); returns the function that tells them. */
function link(frame, apply) {
  document.addEventListener(CHANNEL, heldBy(frame, ({ detail }) => {
    if (detail.from !== frame && frame.isConnected) apply(detail);
  }), { signal: frame.gone });
  return (selection) => document.dispatchEvent(new CustomEvent(CHANNEL, { detail: { ...selection, from: frame } }));
}

/** A notebook takes keys for its own commands unless they stop here; those with Ctrl or Meta are left to it. */
function keepKeys(frame) {
  frame.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
}

// ---------------------------------------------------------------------------------------------- pages

/** What a page of its own wants once its module is loaded. */
export function ready(page) {
  const start = () => { sortTables(page); offerDownloads(page); };
  if (page.readyState === "loading") page.addEventListener("DOMContentLoaded", start);
  else start();
}

/** Sort the rows of every table.sortable under `root` when a column's button is pressed. */
export function sortTables(root) {
  for (const table of root.querySelectorAll("table.sortable")) {
    table.tHead.addEventListener("click", (event) => {
      const head = event.target.closest("button")?.closest("th");
      if (head) sortBy(table, head);
    });
  }
}

function sortBy(table, head) {
  const descending = head.getAttribute("aria-sort") === "ascending";
  const column = head.cellIndex;
  const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, text: key(row), number: parseFloat(key(row)) }));
  const numeric = rows.some((r) => !Number.isNaN(r.number)) && rows.every((r) => r.text === "" || !Number.isNaN(+r.text));
  const compare = numeric ? (a, b) => a.number - b.number : (a, b) => a.text.localeCompare(b.text, "en", { numeric: true });
  const missing = (r) => numeric && Number.isNaN(r.number); // what is missing comes last either way
  rows.sort((a, b) => missing(a) - missing(b) || (descending ? compare(b, a) : compare(a, b)));
  table.tBodies[0].append(...rows.map((r) => r.row));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

/** A button below every figure and in the caption of every table, which saves it as SVG or as CSV. */
export function offerDownloads(root) {
  for (const figure of root.querySelectorAll("figure")) {
    const image = figure.querySelector("img[src^='data:image/svg']");
    if (image) figure.append(downloadOf("SVG", image.alt, () => image.src));
  }
  for (const table of root.querySelectorAll("table.sortable")) {
    const name = table.caption.textContent;
    table.caption.append(downloadOf("CSV", name, () => URL.createObjectURL(new Blob([csvOf(table)], { type: "text/csv" }))));
  }
}

function downloadOf(kind, name, address) {
  const button = element("button", { type: "button", class: "download", text: `Save as ${kind}`, "aria-label": `Save as ${kind}: ${name}` });
  button.addEventListener("click", () => {
    const file = name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "mixlens";
    element("a", { href: address(), download: `${file}.${kind.toLowerCase()}` }).click();
  });
  return button;
}

/** The rows of a table as CSV; an interval below a number makes two columns of its own. */
export function csvOf(table) {
  const rows = [...table.rows].map((row) => [...row.cells].map(cellParts));
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  const whole = rows.map((row, i) => row.flatMap((parts, column) => Array.from({ length: widths[column] }, (_, part) =>
    parts[part] ?? (i ? "" : `${parts[0]} ${part === 1 ? "low" : "high"}`))));
  return whole.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
}

function cellParts(cell) {
  const interval = cell.querySelector("small")?.textContent ?? "";
  const text = (cell.dataset.v ?? cell.textContent).trim();
  const shown = interval ? cell.firstChild.textContent : text;
  return interval ? [shown, ...interval.split(" to ")] : [shown];
}

/** A cell that no spreadsheet takes for a formula. */
export function csvCell(text) {
  const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

// ---------------------------------------------------------------------------------------------- shared

/** `index` kept inside `count`. */
const clamp = (index, count) => Math.max(0, Math.min(count - 1, index));

function element(name, { text, ...attributes }, children = []) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

/** An SVG element. */
function drawn(name, { text, ...attributes }, children = []) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

/** A labelled range input over `values`; `slider.show(index)` moves it without telling `chosen`. */
function sliderOver(name, values, chosen) {
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
function chooserOf(name, values, chosen) {
  const select = element("select", { "aria-label": name });
  select.append(...values.map((value, i) => element("option", { value: i, text: String(value) })));
  select.addEventListener("change", () => chosen(Number(select.value)));
  const chooser = element("label", {}, [`${name} `, select]);
  chooser.show = (index) => { select.value = index; };
  return chooser;
}

/** Two buttons, back and on, that call `go` with -1 and 1. */
function stepButtons(what, go) {
  return [["◂", "previous", -1], ["▸", "next", 1]].map(([sign, way, by]) => {
    const button = element("button", { type: "button", class: "step", text: sign, "aria-label": `${way} ${what}` });
    button.addEventListener("click", () => go(by));
    return button;
  });
}

/** Buttons, one an expert; `buttons.show(expert)` presses one without telling `chosen`; -1 is none. */
function expertButtons(count, chosen) {
  const buttons = Array.from({ length: count }, (_, e) =>
    element("button", { type: "button", class: `expert e${e}`, text: String(e), "aria-pressed": "false", title: `only expert ${e}` }));
  const group = element("span", { class: "experts", role: "group", "aria-label": "show one expert only" }, ["expert ", ...buttons]);
  group.show = (expert) => buttons.forEach((button, e) => button.setAttribute("aria-pressed", String(e === expert)));
  buttons.forEach((button, e) => button.addEventListener("click", () => chosen(e)));
  return group;
}

// ---------------------------------------------------------------------------------------------- colours

const SHADES = 24; // depths of a token's ground: classes, since a style of its own a token is slow to compute

/** Class name of a ground as deep as `share`, from 0 to 1, in the colour of --tint. */
const shadeLook = (share) => ` w${Math.round((SHADES - 1) * Math.max(0, Math.min(1, share)))}`;

function shadeRules() {
  return Array.from({ length: SHADES }, (_, level) => {
    const depth = 4 + (38 * level) / (SHADES - 1); // text stays readable on the deepest
    return `.w${level}{background-color:color-mix(in srgb,var(--tint) ${depth.toFixed(1)}%,transparent)}`;
  }).join("");
}

/** Rules for experts. A token's are without variables and its digit is a picture: then a step costs no layout. */
function expertRules(colours) {
  const width = 7 * String(colours.length - 1).length;
  return colours.map((colour, e) =>
    `.e${e}:not(.t){--first:${colour};--ink:${inkOn(colour)}}.s${e}:not(.t){--second:${colour}}` +
    `.t.e${e}{border-bottom-color:${colour}}.t.s${e}{box-shadow:0 1px 0 var(--ground),0 3px 0 ${colour}}` +
    `.digits .e${e}{background-image:${digitPicture(e, width, "#1b1b1f")}}` +
    `@media screen{[data-theme=dark] .digits .e${e}{background-image:${digitPicture(e, width, "#e8e8ee")}}}`).join("") +
    `.digits .t{padding-right:${width}px;background-size:auto 11px}`;
}

function digitPicture(expert, width, colour) {
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="11" viewBox="0 0 ${width} 11">` +
    `<text x="1" y="10" font-family="system-ui, sans-serif" font-size="10.5" fill="${colour}">${expert}</text></svg>`;
  return `url("data:image/svg+xml,${encodeURIComponent(svg)}")`;
}

function inkOn(colour) {
  const linear = [1, 3, 5].map((i) => (parseInt(colour.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000" : "#fff";
}

/** Dark or light as the notebook says, else as the system says; follows when it changes. */
function followTheme(frame) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = heldBy(frame, () => {
    const { jpThemeLight } = document.body.dataset;
    const code = document.body.className.match(/\bvscode-(dark|light|high-contrast)\b/)?.[1];
    const page = `${document.documentElement.className} ${document.body.className}`.match(/(?:^|\s)(dark|light)(?:\s|$)/)?.[1];
    const dark = jpThemeLight ? jpThemeLight === "false" : code ? code !== "light" : page ? page === "dark" : system.matches;
    frame.dataset.theme = dark ? "dark" : "light";
  });
  apply();
  system.addEventListener("change", apply, { signal: frame.gone });
  const watch = new MutationObserver(apply);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  watch.observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });
  frame.gone.addEventListener("abort", watch.disconnect.bind(watch));
}
