// The token view: a text underlined by its experts. Spans are made, and painted, only for what is in sight.

const CHUNK = 200; // tokens of a block, at least; it ends at a line end or at a space where there is one
const RED = "#bd1f01", BLUE = "#3f90da", GREY = "#8a8a99";

/** The blocks [first, last) that a sequence is laid out in. */
function blocksOf(run, first, last) {
  const blocks = [];
  for (let start = first, stop; start < last; start = stop) {
    const least = Math.min(last, start + CHUNK), most = Math.min(last, start + 2 * CHUNK);
    stop = most === last && last - start <= 1.5 * CHUNK ? last : least;
    for (let token = least; stop < last && token < most; token++) {
      if (run.piece(token - 1).includes("\n")) { stop = token; break; }
      if (stop === least && run.piece(token).startsWith(" ") && token > least) stop = token;
    }
    blocks.push([start, stop]);
  }
  return blocks;
}

/** What a token can be coloured by: [name, background(token) or "", how the scale reads]. */
function colourings(run, state, colours) {
  const { arrays, topK } = run;
  const slots = (token) => {
    if (state.focus < 0) return [...Array(topK).keys()];
    const slot = run.slotOf(token, state.focus, state.layer);
    return slot < 0 ? [] : [slot];
  };
  const sum = (name, token) => slots(token).reduce((total, slot) => total + run.added(name, token, slot, state.layer), 0);
  const whose = () => (state.focus < 0 ? "both choices together" : `expert ${state.focus}`);
  const modes = [["experts", (token) => {
    const slot = state.focus < 0 ? -1 : run.slotOf(token, state.focus, state.layer);
    return slot < 0 ? "" : tint(colours[state.focus], arrays.weight ? run.weight(token, slot, state.layer) : 0.5);
  }, () => ""]];
  if (arrays.entropy) {
    const most = Math.log2(run.nExperts);
    modes.push(["router entropy", (token) => tint(BLUE, run.entropy(token, state.layer) / most), () => `Blue: router entropy, 0 to ${most.toFixed(1)} bits.`]);
  }
  if (arrays.surprise) {
    modes.push(["surprise", (token) => tint(RED, -run.logprob(token) / 10 || 0), () => "Red: surprise, −log p, 0 to 10 nat."]);
  }
  if (arrays.norm) {
    const most = 127 * run.steps.norm;
    modes.push(["output norm", (token) => tint(BLUE, sum("norm", token) / most), () => `Blue: norm of the weighted output, ${whose()}, 0 to ${most.toPrecision(2)}.`]);
  }
  if (arrays.logit) {
    const most = 127 * run.steps.logit;
    modes.push(["logit added", (token) => {
      const value = sum("logit", token);
      return value ? tint(value < 0 ? RED : BLUE, Math.abs(value) / most) : "";
    }, () => `Blue: raises the next token's logit, red: lowers it, ${whose()}; full at ±${most.toPrecision(2)}.`]);
  }
  return modes;
}

VIEWS.tokens = function tokens(frame, data) {
  const run = routing(data);
  const { layers, starts, nExperts, topK } = run;
  const state = { sequence: 0, layer: data.layer, cursor: -1, pinned: false, focus: -1, stamp: 0, mode: 0, hits: new Set() };
  const modes = colourings(run, state, data.colours);
  const tell = link(frame, (told) => {
    if (told.layer !== undefined && layers.includes(told.layer)) setLayer(layers.indexOf(told.layer));
    if (told.expert !== undefined && (told.expert ?? -1) < nExperts) setFocus(told.expert ?? -1);
    const wanted = told.domain === undefined ? -1 : data.domains.indexOf(told.domain);
    if (wanted >= 0 && data.domains[state.sequence] !== told.domain) setSequence(wanted);
  });

  // Controls
  const slider = sliderOver("layer", layers, (index) => { setLayer(index); tell({ layer: layers[index] }); });
  const digits = element("input", { type: "checkbox" });
  const chooser = chooserOf("sequence", data.labels, (index) => {
    setSequence(index);
    if (data.domains[index] !== null) tell({ domain: data.domains[index] });
  });
  const experts = expertButtons(nExperts, (e) => {
    setFocus(state.focus === e ? -1 : e);
    tell({ expert: state.focus < 0 ? null : state.focus });
  });
  const strongest = stepper("strongest", "where the expert is strongest at this layer");
  const search = element("input", { type: "search", placeholder: "search", "aria-label": "search the text; Enter for the next", size: 12 });
  const found = stepper("", "what was searched for");
  const colouring = chooserOf("colour", modes.map(([name]) => name), (index) => { state.mode = index; repaint(); describe(); });
  frame.append(
    element("div", { class: "controls" }, [
      data.labels.length > 1 ? chooser : element("span", { text: data.labels[0] }),
      slider,
      element("label", {}, [digits, " digits"]),
      experts, strongest,
      element("span", { class: "search" }, [search, found]),
      ...(modes.length > 1 ? [colouring] : []),
    ]));
  const text = element("div", {
    class: "text", tabindex: 0, role: "group",
    "aria-label": "Tokens. Left and right arrow keys move from token to token, up and down from layer to layer.",
  });
  const readout = element("div", { class: "readout", "aria-live": "polite" });
  const strip = element("div", { class: "strip", role: "group", "aria-label": "first choice in every layer" });
  const legend = element("p", { class: "legend" });
  frame.append(text, readout, strip, legend);

  // Layout: one block element a chunk, filled when it comes near
  let chunks = [];
  const visible = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target);
      else visible.delete(target);
    }
    paintVisible();
  }, { root: text, rootMargin: "160px" });

  function build() {
    observer.disconnect();
    visible.clear();
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    chunks = blocksOf(run, first, last).map(([start, stop]) => {
      const chunk = element("div", { class: "chunk" });
      let plain = "";
      for (let token = start; token < stop; token++) plain += visibleText(run.piece(token));
      chunk.textContent = plain;
      return Object.assign(chunk, { range: [start, stop], stamp: -1, spans: null });
    });
    text.replaceChildren(...chunks);
    text.scrollTop = 0;
    Object.assign(state, { cursor: first, pinned: false });
    state.hits.clear();
    strongest.reset();
    found.reset();
    for (const chunk of chunks.slice(0, 2)) visible.add(chunk);
    for (const chunk of chunks) observer.observe(chunk);
    repaint();
    describe();
    read(first);
  }

  function fill(chunk) {
    const [start, stop] = chunk.range;
    const nodes = [];
    chunk.spans = [];
    for (let token = start; token < stop; token++) {
      const span = document.createElement("span");
      span.token = token;
      const piece = run.piece(token);
      span.textContent = visibleText(piece);
      chunk.spans.push(span);
      nodes.push(span);
      if (piece.includes("\n") && token < stop - 1) nodes.push(document.createElement("br"));
    }
    chunk.replaceChildren(...nodes);
  }

  function spanOf(token) {
    const chunk = chunks.find(({ range }) => token >= range[0] && token < range[1]);
    if (!chunk) return undefined;
    if (!chunk.spans) paintVisible([chunk]);
    return chunk.spans[token - chunk.range[0]];
  }

  function repaint() {
    state.stamp++;
    paintVisible();
  }

  function paintVisible(wanted = visible) {
    for (const chunk of wanted) {
      if (chunk.stamp === state.stamp) continue;
      chunk.stamp = state.stamp;
      if (!chunk.spans) fill(chunk);
      chunk.spans.forEach((span, i) => paint(span, chunk.range[0] + i));
    }
  }

  function paint(span, token) {
    let name = `t e${run.expert(token, 0, state.layer)}`;
    if (topK > 1) name += ` s${run.expert(token, 1, state.layer)}`;
    if (!state.mode && state.focus >= 0 && run.slotOf(token, state.focus, state.layer) < 0) name += " off";
    if (run.arrays.phase?.[token]) name += " generated";
    if (state.hits.has(token)) name += " hit";
    const background = modes[state.mode][1](token);
    if (span.className !== name) span.className = name;
    if (span.tinted !== background) span.style.background = span.tinted = background;
  }

  function describe() {
    const n = starts[state.sequence + 1] - starts[state.sequence];
    legend.textContent = `n = ${n.toLocaleString("en")} ${n === 1 ? "token" : "tokens"} of this sequence. Thick underline: first choice` +
      `${topK > 1 ? "; thin: second." : "."} ${modes[state.mode][2]()} Hover, click (to hold) or use the arrow keys.`;
  }

  // Readout of one token
  function read(token) {
    spanOf(state.cursor)?.removeAttribute("data-cursor");
    state.cursor = token;
    const span = spanOf(token);
    if (!span) return readout.replaceChildren("This sequence has no tokens.");
    span.setAttribute("data-cursor", "");
    readout.replaceChildren(...factNodes(factsOf(run, token, state.layer)));
    strip.replaceChildren(...layers.map((number, layer) => element("button", {
      type: "button", tabindex: -1, text: String(run.expert(token, 0, layer)),
      class: `cell e${run.expert(token, 0, layer)}` + (topK > 1 ? ` s${run.expert(token, 1, layer)}` : ""),
      title: `layer ${number}`, ...(layer === state.layer ? { "aria-current": "true" } : {}),
    })));
  }

  function setSequence(index) {
    state.sequence = index;
    chooser.show(index);
    build();
  }

  function setLayer(layer) {
    state.layer = Math.max(0, Math.min(layers.length - 1, layer));
    slider.show(state.layer);
    strongest.reset();
    repaint();
    read(state.cursor);
  }

  function setFocus(e) {
    state.focus = e;
    experts.show(e);
    strongest.reset();
    strongest.hidden = e < 0;
    describe();
    repaint();
  }

  function moveTo(token) {
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    read(Math.max(first, Math.min(last - 1, token)));
    state.pinned = true;
    spanOf(state.cursor)?.scrollIntoView({ block: "nearest" });
  }

  /** Buttons to step through a list of tokens; `list` is made when it is first asked for. */
  function stepper(name, title) {
    const [back, on] = [["◂", "previous token"], ["▸", "next token"]].map(([sign, way]) =>
      element("button", { type: "button", class: "step", text: sign, "aria-label": `${way} ${title}` }));
    const output = element("output", {});
    const node = element("span", { class: "stepper" }, [name, back, on, output]);
    node.hidden = true;
    node.reset = () => { node.list = null; output.textContent = ""; };
    node.go = (by) => {
      node.list ??= node.make();
      if (!node.list.length) { output.textContent = "0 tokens"; return; }
      node.at = node.at === undefined || !output.textContent ? (by > 0 ? 0 : node.list.length - 1) : (node.at + by + node.list.length) % node.list.length;
      output.textContent = `${(node.at + 1).toLocaleString("en")} of ${node.list.length.toLocaleString("en")}`;
      moveTo(node.list[node.at]);
    };
    back.addEventListener("click", () => node.go(-1));
    on.addEventListener("click", () => node.go(1));
    return node;
  }

  strongest.make = () => {
    const chosen = [];
    for (let token = starts[state.sequence]; token < starts[state.sequence + 1]; token++) {
      const slot = run.slotOf(token, state.focus, state.layer);
      if (slot >= 0) chosen.push([run.arrays.weight ? run.weight(token, slot, state.layer) : -slot, token]);
    }
    return chosen.sort((a, b) => b[0] - a[0] || a[1] - b[1]).map(([, token]) => token);
  };

  // Search: over the text, so that a match may span tokens
  found.make = () => {
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    const ends = [];
    let whole = "";
    for (let token = first; token < last; token++) { whole += run.piece(token).toLowerCase(); ends.push(whole.length); }
    const wanted = search.value.toLowerCase(), list = [];
    state.hits.clear();
    for (let at = whole.indexOf(wanted), i = 0; at >= 0 && wanted; at = whole.indexOf(wanted, at + wanted.length)) {
      while (ends[i] <= at) i++;
      list.push(first + i);
      for (let j = i; j < ends.length && (j === i || ends[j - 1] < at + wanted.length); j++) state.hits.add(first + j);
    }
    repaint();
    return list;
  };
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    found.hidden = false;
    found.go(event.shiftKey ? -1 : 1);
  });
  search.addEventListener("input", () => {
    found.reset();
    if (!search.value) { state.hits.clear(); found.hidden = true; repaint(); }
  });

  const keys = {
    ArrowLeft: () => moveTo(state.cursor - 1),
    ArrowRight: () => moveTo(state.cursor + 1),
    ArrowUp: () => { setLayer(state.layer - 1); tell({ layer: layers[state.layer] }); },
    ArrowDown: () => { setLayer(state.layer + 1); tell({ layer: layers[state.layer] }); },
    Home: () => moveTo(starts[state.sequence]),
    End: () => moveTo(starts[state.sequence + 1] - 1),
    Enter: () => { state.pinned = !state.pinned; },
    Escape: () => { state.pinned = false; },
  };
  text.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
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
    if (layer >= 0) { setLayer(layer); tell({ layer: layers[layer] }); }
  });
  digits.addEventListener("change", () => text.classList.toggle("digits", digits.checked));
  addEventListener("beforeprint", () => paintVisible(chunks));

  slider.show(state.layer);
  build();
};
