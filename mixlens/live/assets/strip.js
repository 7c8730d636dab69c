// @ts-check
// A short text as a strip: tokens across, layers down.

import { clamp, element, expertButtons } from "./dom.js";
import { link } from "./linked.js";
import { factNodes, factsOf, routing, visibleText } from "./routing.js";

/** Up to 40 tokens across, layers down: first choice in a cell, second as its foot. */
export function strip(frame, data) {
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
    state.layer = clamp(layer, layers.length);
    state.token = clamp(token, nTokens);
    mark();
    tell({ layer: layers[state.layer] });
  }
  table.addEventListener("click", (/** @type {any} */ event) => { if (event.target.place) go(...event.target.place); });
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    go(state.layer + step[0], state.token + step[1]);
  });
  mark();
}
