// Two runs over the same tokens, side by side under one cursor; and a short text as a strip of layers.

VIEWS.diff = function diff(frame, data) {
  const runs = data.runs.map((name) => ({ name, ...routing({ ...data, ...data.of[name], arrays: renamed(data.arrays, name), shapes: renamed(data.shapes, name) }) }));
  const [a, b] = runs;
  const { layers, starts } = a;
  const state = { sequence: 0, layer: data.layer, cursor: 0, which: 0 };
  const sets = (run, token) => Array.from({ length: run.topK }, (_, s) => run.expert(token, s, state.layer)).sort().join();
  const changes = [
    ["first choice", (token) => a.expert(token, 0, state.layer) !== b.expert(token, 0, state.layer)],
    ["set of experts", (token) => sets(a, token) !== sets(b, token)],
  ];
  const changed = (token) => changes[state.which][1](token);
  const tell = link(frame, (told) => {
    if (layers.includes(told.layer)) setLayer(layers.indexOf(told.layer));
    const wanted = told.domain === undefined ? -1 : data.domains.indexOf(told.domain);
    if (wanted >= 0 && data.domains[state.sequence] !== told.domain) { state.sequence = wanted; chooser.show(wanted); build(); }
  });

  const chooser = chooserOf("sequence", data.labels, (index) => {
    state.sequence = index;
    build();
    if (data.domains[index] !== null) tell({ domain: data.domains[index] });
  });
  const slider = sliderOver("layer", layers, (index) => { setLayer(index); tell({ layer: layers[index] }); });
  const what = chooserOf("changed", changes.map(([name]) => name), (index) => { state.which = index; paint(); });
  const [back, on] = [["◂", -1], ["▸", 1]].map(([sign, by]) => {
    const button = element("button", { type: "button", class: "step", text: sign, "aria-label": `${by < 0 ? "previous" : "next"} changed token` });
    button.addEventListener("click", () => jump(by));
    return button;
  });
  const texts = runs.map((run) => element("div", {
    class: "text half", tabindex: 0, role: "group",
    "aria-label": `${run.name}. Left and right arrow keys move from token to token, up and down from layer to layer.`,
  }));
  const readouts = runs.map(() => element("div", { class: "readout" }));
  const legend = element("p", { class: "legend", "aria-live": "polite" });
  frame.append(
    element("div", { class: "controls" }, [data.labels.length > 1 ? chooser : element("span", { text: data.labels[0] }), slider, what, element("span", { class: "stepper" }, ["changed ", back, on])]),
    element("div", { class: "halves" }, runs.map((run, i) => element("section", {}, [element("h4", { text: run.name }), texts[i], readouts[i]]))),
    legend);

  function build() {
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    texts.forEach((text, i) => {
      const nodes = [];
      for (let token = first; token < last; token++) {
        const span = element("span", { text: visibleText(runs[i].piece(token)) });
        span.token = token;
        nodes.push(span);
        if (runs[i].piece(token).includes("\n")) nodes.push(document.createElement("br"));
      }
      text.replaceChildren(...nodes);
      text.spans = nodes.filter((node) => node.token !== undefined);
    });
    state.cursor = first;
    paint();
  }

  function paint() {
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    let n = 0;
    for (let token = first; token < last; token++) {
      const differs = changed(token);
      n += differs;
      runs.forEach((run, i) => {
        const second = run.topK > 1 ? ` s${run.expert(token, 1, state.layer)}` : "";
        texts[i].spans[token - first].className = `t e${run.expert(token, 0, state.layer)}${second}${differs ? " changed" : ""}`;
      });
    }
    legend.textContent = `${n.toLocaleString("en")} of ${(last - first).toLocaleString("en")} tokens of this sequence have another ` +
      `${changes[state.which][0]} at layer ${layers[state.layer]} (outlined). The cursor is in both texts.`;
    read(state.cursor);
  }

  function read(token) {
    const first = starts[state.sequence];
    texts.forEach((text, i) => {
      text.spans[state.cursor - first]?.removeAttribute("data-cursor");
      text.spans[token - first]?.setAttribute("data-cursor", "");
      if (token < starts[state.sequence + 1]) readouts[i].replaceChildren(...factNodes(factsOf(runs[i], token, state.layer)));
    });
    state.cursor = token;
  }

  function setLayer(layer) {
    state.layer = Math.max(0, Math.min(layers.length - 1, layer));
    slider.show(state.layer);
    paint();
  }

  function moveTo(token) {
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    read(Math.max(first, Math.min(last - 1, token)));
    for (const text of texts) {
      const span = text.spans[state.cursor - first];
      if (span) text.scrollTop += span.getBoundingClientRect().top - text.getBoundingClientRect().top - text.clientHeight / 2;
    }
  }

  function jump(by) {
    const [first, last] = [starts[state.sequence], starts[state.sequence + 1]];
    for (let step = 1, n = last - first; step <= n; step++) {
      const token = first + ((((state.cursor - first + by * step) % n) + n) % n);
      if (changed(token)) return moveTo(token);
    }
  }

  const keys = {
    ArrowLeft: () => moveTo(state.cursor - 1),
    ArrowRight: () => moveTo(state.cursor + 1),
    ArrowUp: () => { setLayer(state.layer - 1); tell({ layer: layers[state.layer] }); },
    ArrowDown: () => { setLayer(state.layer + 1); tell({ layer: layers[state.layer] }); },
  };
  for (const text of texts) {
    text.addEventListener("keydown", (event) => {
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    text.addEventListener("pointerover", (event) => { if (event.target.token !== undefined) read(event.target.token); });
  }
  slider.show(state.layer);
  build();
};

/** Entries of a run of several, "name/array", under their own names; those without a name are shared. */
function renamed(entries, name) {
  const own = {};
  for (const [key, value] of Object.entries(entries)) {
    const [run, array] = key.includes("/") ? key.split("/") : [name, key];
    if (run === name) own[array] = value;
  }
  return own;
}

/** Up to 40 tokens across, layers down: first choice in a cell, second as its foot. */
VIEWS.strip = function strip(frame, data) {
  const run = routing(data);
  const { layers, nTokens, topK } = run;
  const state = { layer: 0, token: 0, focus: -1 };
  const tell = link(frame, (told) => {
    if (layers.includes(told.layer)) state.layer = layers.indexOf(told.layer);
    if (told.expert !== undefined && (told.expert ?? -1) < run.nExperts) { state.focus = told.expert ?? -1; experts.show(state.focus); }
    mark();
  });
  const experts = expertButtons(run.nExperts, (e) => {
    state.focus = state.focus === e ? -1 : e;
    experts.show(state.focus);
    mark();
    tell({ expert: state.focus < 0 ? null : state.focus });
  });
  const table = element("table", { class: "routing", tabindex: 0, "aria-label": "Routing. Arrow keys move from token to token and layer to layer." });
  const readout = element("div", { class: "readout", "aria-live": "polite" });
  const tokens = Array.from({ length: nTokens }, (_, token) => token);
  const cells = layers.map((number, layer) => tokens.map((token) => {
    const cell = element("td", { text: String(run.expert(token, 0, layer)), class: `cell e${run.expert(token, 0, layer)}` + (topK > 1 ? ` s${run.expert(token, 1, layer)}` : "") });
    cell.place = [layer, token];
    return cell;
  }));
  table.append(
    element("thead", {}, [element("tr", {}, [element("th", { text: "layer" }), ...tokens.map((token) => element("th", {}, [element("span", { text: visibleText(run.piece(token)), dir: "auto" })]))])]),
    element("tbody", {}, layers.map((number, layer) => element("tr", {}, [element("th", { text: String(number) }), ...cells[layer]]))));
  frame.append(element("div", { class: "controls" }, [element("span", { text: data.labels[0] }), experts]), element("div", { class: "across" }, [table]), readout,
    element("p", { class: "legend", text: `n = ${nTokens} tokens. Cell and digit: first choice; its foot: second.` }));

  function mark() {
    cells.forEach((row, layer) => row.forEach((cell, token) => {
      cell.toggleAttribute("data-cursor", layer === state.layer && token === state.token);
      cell.classList.toggle("dim", state.focus >= 0 && run.slotOf(token, state.focus, layer) < 0);
    }));
    readout.replaceChildren(...factNodes([["layer", String(layers[state.layer])], ...factsOf(run, state.token, state.layer)]));
  }

  function go(layer, token) {
    state.layer = Math.max(0, Math.min(layers.length - 1, layer));
    state.token = Math.max(0, Math.min(nTokens - 1, token));
    mark();
    tell({ layer: layers[state.layer] });
  }
  table.addEventListener("click", (event) => { if (event.target.place) go(...event.target.place); });
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    go(state.layer + step[0], state.token + step[1]);
  });
  mark();
};
