// Live views of mixlens: one plain ES module for notebooks, saved pages and the report. No request, no library.
// Text that comes from a model reaches the page through textContent alone.

const TYPES = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };

/** Header and arrays that show/packing.py packed. */
export async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
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

/** Put the live view of `kind` into the shadow root of `host`, over its static content. */
export async function mount(host, kind, packed, css) {
  const data = await unpack(packed);
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const frame = element("div", { class: "frame" });
  followTheme(frame);
  root.replaceChildren(element("style", { text: css + expertRules(data.colours) }), frame);
  VIEWS[kind](frame, data);
  host.dataset.ready = "1";
}

/** What a page of its own wants once its module is loaded. */
export function ready(page) {
  const start = () => sortTables(page);
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

// ---------------------------------------------------------------------------------------------- token view

const CHUNK = 400; // tokens that are painted together once they come into sight
const LONGEST = 80; // characters of one token shown in the text

function tokens(frame, data) {
  const { arrays, layers, starts, n_experts: nExperts, top_k: topK } = data;
  const nTokens = starts[starts.length - 1];
  const keptWeights = data.shapes.weight?.[1][0] ?? 0;
  const state = { sequence: 0, layer: data.layer, cursor: -1, pinned: false, focus: -1, stamp: 0 };
  const plane = (slot, layer) => (slot * layers.length + layer) * nTokens;

  const expert = (token, slot, layer = state.layer) => arrays.expert[plane(slot, layer) + token];
  const weight = (token, slot) => {
    const stored = (s) => arrays.weight[plane(s, state.layer) + token] / 255;
    if (slot < keptWeights) return stored(slot);
    let rest = 1;
    for (let s = 0; s < keptWeights; s++) rest -= stored(s);
    return Math.max(0, rest);
  };
  const piece = (token) => (arrays.piece ? data.pieces[arrays.piece[token]] : `t${arrays.position[token]}`);

  // Controls
  const slider = element("input", { type: "range", min: 0, max: layers.length - 1, step: 1, "aria-label": "layer" });
  const layerName = element("output", {});
  const digits = element("input", { type: "checkbox" });
  const chooser = element("select", { "aria-label": "sequence" });
  chooser.append(...data.labels.map((label, i) => element("option", { value: i, text: label })));
  const experts = Array.from({ length: nExperts }, (_, e) =>
    element("button", { type: "button", class: `expert e${e}`, text: String(e), "aria-pressed": "false", title: `only expert ${e}` }));
  const controls = element("div", { class: "controls" }, [
    data.labels.length > 1 ? element("label", {}, ["sequence ", chooser]) : element("span", { text: data.labels[0] }),
    element("label", { class: "slider" }, ["layer ", slider, layerName]),
    element("label", {}, [digits, " digits"]),
    element("span", { class: "experts", role: "group", "aria-label": "show one expert only" }, ["expert ", ...experts]),
  ]);
  const text = element("div", {
    class: "text", tabindex: 0, role: "group",
    "aria-label": "Tokens. Left and right arrow keys move from token to token, up and down from layer to layer.",
  });
  const readout = element("div", { class: "readout", "aria-live": "polite" });
  const strip = element("div", { class: "strip", role: "group", "aria-label": "first choice in every layer" });
  const legend = element("p", { class: "legend" });
  frame.append(controls, text, readout, strip, legend);

  // Painting: only the chunks in sight; the others when they come into sight
  let spans = [];
  const visible = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target);
      else visible.delete(target);
    }
    paintVisible();
  }, { root: text, rootMargin: "300px" });

  function build() {
    observer.disconnect();
    visible.clear();
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    spans = [];
    const chunks = [];
    for (let start = first; start < last; start += CHUNK) {
      const chunk = element("span", {});
      chunk.range = [start, Math.min(last, start + CHUNK)];
      for (let token = chunk.range[0]; token < chunk.range[1]; token++) {
        const span = document.createElement("span");
        span.token = token;
        const shown = piece(token);
        span.textContent = visibleText(shown);
        spans.push(span);
        chunk.append(span);
        if (shown.includes("\n")) chunk.append(document.createElement("br"));
      }
      chunks.push(chunk);
    }
    text.replaceChildren(...chunks);
    text.scrollTop = 0;
    state.cursor = first;
    state.pinned = false;
    for (const chunk of chunks.slice(0, 2)) visible.add(chunk);
    for (const chunk of chunks) observer.observe(chunk);
    const noun = last - first === 1 ? "token" : "tokens";
    legend.textContent = `n = ${(last - first).toLocaleString("en")} ${noun} of this sequence. Thick underline: first choice` +
      (topK > 1 ? "; thin: second." : ".") + " Hover, click (to hold) or use the arrow keys.";
    repaint();
    read(first);
  }

  function repaint() {
    state.stamp++;
    paintVisible();
  }

  function paintVisible(chunks = visible) {
    for (const chunk of chunks) {
      if (chunk.stamp === state.stamp) continue;
      chunk.stamp = state.stamp;
      const offset = starts[state.sequence];
      for (let token = chunk.range[0]; token < chunk.range[1]; token++) paint(spans[token - offset], token);
    }
  }

  function paint(span, token) {
    let name = `t e${expert(token, 0)}`;
    if (topK > 1) name += ` s${expert(token, 1)}`;
    let background = "";
    if (state.focus >= 0) {
      const slot = slotOf(token, state.focus);
      if (slot < 0) name += " off";
      else background = tint(state.focus, arrays.weight ? weight(token, slot) : 0.5);
    }
    if (data.arrays.phase?.[token]) name += " generated";
    if (span.className !== name) span.className = name;
    if (span.style.background !== background) span.style.background = background;
  }

  function slotOf(token, wanted) {
    for (let slot = 0; slot < topK; slot++) if (expert(token, slot) === wanted) return slot;
    return -1;
  }

  const tint = (e, share) => `color-mix(in srgb, ${data.colours[e]} ${Math.round(12 + 48 * share)}%, transparent)`;

  // Readout of one token
  function read(token) {
    const offset = starts[state.sequence];
    spans[state.cursor - offset]?.removeAttribute("data-cursor");
    state.cursor = token;
    const span = spans[token - offset];
    if (!span) return readout.replaceChildren("This sequence has no tokens.");
    span.setAttribute("data-cursor", "");
    const facts = [["token", quoted(piece(token))]];
    if (arrays.token_id) facts.push(["id", String(arrays.token_id[token])]);
    facts.push(["position", String(arrays.position[token])]);
    for (let slot = 0; slot < topK; slot++) {
      const e = expert(token, slot);
      const value = arrays.weight ? `${e} (weight ${weight(token, slot).toFixed(2)})` : String(e);
      facts.push([["first", "second"][slot] ?? `choice ${slot + 1}`, value, e]);
    }
    if (arrays.entropy) {
      const bits = (arrays.entropy[state.layer * nTokens + token] / 255) * Math.log2(nExperts);
      facts.push(["router entropy", `${bits.toFixed(2)} bits`]);
    }
    if (arrays.logprob) {
      const value = arrays.logprob[token];
      const shown = Number.isNaN(value) ? "none (first token)" : `${value.toFixed(2)} nat (p = ${Math.exp(value).toPrecision(2)})`;
      facts.push(["log-probability", shown]);
    }
    if (data.arrays.phase?.[token]) facts.push(["phase", "generated"]);
    readout.replaceChildren(...facts.map(([name, value, e]) => element("span", { class: "fact" }, [
      element("span", { class: "name", text: name }),
      ...(e === undefined ? [] : [element("i", { class: `swatch e${e}` })]),
      element("b", { text: value, dir: "auto" }),
    ])));
    strip.replaceChildren(...layers.map((number, layer) => element("button", {
      type: "button", tabindex: -1, text: String(expert(token, 0, layer)),
      class: `cell e${expert(token, 0, layer)}` + (topK > 1 ? ` s${expert(token, 1, layer)}` : ""),
      title: `layer ${number}`, ...(layer === state.layer ? { "aria-current": "true" } : {}),
    })));
  }

  function setLayer(layer) {
    state.layer = Math.max(0, Math.min(layers.length - 1, layer));
    slider.value = state.layer;
    layerName.textContent = layers[state.layer];
    repaint();
    read(state.cursor);
  }

  function setFocus(e) {
    state.focus = state.focus === e ? -1 : e;
    experts.forEach((button, i) => button.setAttribute("aria-pressed", String(i === state.focus)));
    repaint();
  }

  function moveTo(token) {
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    read(Math.max(first, Math.min(last - 1, token)));
    state.pinned = true;
    spans[state.cursor - first]?.scrollIntoView({ block: "nearest" });
  }

  const keys = {
    ArrowLeft: () => moveTo(state.cursor - 1),
    ArrowRight: () => moveTo(state.cursor + 1),
    ArrowUp: () => setLayer(state.layer - 1),
    ArrowDown: () => setLayer(state.layer + 1),
    Home: () => moveTo(starts[state.sequence]),
    End: () => moveTo(starts[state.sequence + 1] - 1),
    Escape: () => { state.pinned = false; },
  };
  text.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  });
  // A notebook takes arrow keys for itself unless they stop here.
  for (const control of [slider, chooser]) control.addEventListener("keydown", (event) => event.stopPropagation());
  text.addEventListener("pointerover", (event) => {
    const token = event.target.token;
    if (token !== undefined && !state.pinned) read(token);
  });
  text.addEventListener("click", (event) => {
    const token = event.target.token;
    if (token === undefined) return;
    state.pinned = !(state.pinned && token === state.cursor);
    read(token);
  });
  strip.addEventListener("click", (event) => {
    const layer = [...strip.children].indexOf(event.target);
    if (layer >= 0) setLayer(layer);
  });
  slider.addEventListener("input", () => setLayer(Number(slider.value)));
  digits.addEventListener("change", () => text.classList.toggle("digits", digits.checked));
  chooser.addEventListener("change", () => { state.sequence = Number(chooser.value); build(); });
  experts.forEach((button, e) => button.addEventListener("click", () => setFocus(e)));

  addEventListener("beforeprint", () => paintVisible(text.children));

  slider.value = state.layer;
  layerName.textContent = layers[state.layer];
  build();
}

function visibleText(piece) {
  const shown = piece.replace(/\n/g, "⏎").replace(/\t/g, "→").replace(/\r/g, "␍");
  if (shown.length > LONGEST) return `${shown.slice(0, LONGEST)}… (${piece.length.toLocaleString("en")} characters)`;
  return shown || "·";
}

function quoted(piece) {
  if (piece === "") return "(part of a character)";
  const shown = JSON.stringify(piece);
  return shown.length > 300 ? `${shown.slice(0, 300)}… (${piece.length.toLocaleString("en")} characters)` : shown;
}

const VIEWS = { tokens };

// ---------------------------------------------------------------------------------------------- shared

function element(name, { text, ...attributes }, children = []) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

function expertRules(colours) {
  return colours.map((colour, e) =>
    `.e${e}{--first:${colour};--ink:${inkOn(colour)}}.s${e}{--second:${colour}}.digits .e${e}::after{content:"${e}"}`).join("");
}

function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

/** Dark or light as the notebook says, else as the system says; follows when it changes. */
function followTheme(frame) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const { jpThemeLight } = document.body.dataset;
    const code = document.body.className.match(/\bvscode-(dark|light|high-contrast)\b/)?.[1];
    const dark = jpThemeLight ? jpThemeLight === "false" : code ? code !== "light" : system.matches;
    frame.dataset.theme = dark ? "dark" : "light";
  };
  apply();
  system.addEventListener("change", apply);
  new MutationObserver(apply).observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
}
