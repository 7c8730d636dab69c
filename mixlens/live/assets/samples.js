// @ts-check
// The samples of an evaluation, filtered and read one by one, with the routing of their prompts where it was recorded.

import { chooserOf, clamp, element, sliderOver, stepButtons } from "./dom.js";
import { link } from "./linked.js";
import { factNodes, factsOf, routing } from "./routing.js";
import { choiceLook, TokenText } from "./text.js";

const PAGE_ROWS = 50;

export function samples(frame, data) {
  const { rows } = data;
  const run = data.starts ? routing(data) : null;
  const state = { task: 0, outcome: 0, chosen: 0, shown: [], page: 0, layer: data.layer ?? 0 };
  const outcomes = ["all", "correct", "wrong", "not scored"];
  const outcomeOf = (row) => (row.correct === null ? "not scored" : row.correct >= 1 ? "correct" : row.correct <= 0 ? "wrong" : `${row.correct.toFixed(2)}`);
  const tasks = ["all", ...new Set(rows.map((row) => row.task))];
  const tell = link(frame, (told) => {
    if (run?.layers.includes(told.layer)) setLayer(run.layers.indexOf(told.layer));
  });
  const search = element("input", { type: "search", placeholder: "search", "aria-label": "search prompts and answers", size: 14 });
  const slider = run && sliderOver("layer", run.layers, (index) => { setLayer(index); tell({ layer: run.layers[index] }); });
  const text = run && new TokenText(frame, run, "Tokens of the prompt. Left and right arrow keys move from token to token, up and down from layer to layer.",
    (token) => choiceLook(run, token, state.layer));
  const readout = element("div", { class: "readout" });
  const count = element("output", {});
  const body = element("tbody", {});
  const table = element("table", { class: "list", tabindex: 0, "aria-label": "Samples. Up and down arrow keys move from sample to sample." }, [
    element("thead", {}, [element("tr", {}, ["task", "sample", "outcome", "answer", "target"].map((text) => element("th", { text })))]), body]);
  const panel = element("div", { class: "detail", "aria-live": "polite" });
  frame.append(
    element("div", { class: "controls" }, [
      chooserOf("task", tasks, (index) => { state.task = index; filter(); }),
      chooserOf("outcome", outcomes, (index) => { state.outcome = index; filter(); }),
      search, element("span", { class: "stepper" }, [...stepButtons("page", (by) => { state.page += by; list(); }), count]), ...(run ? [slider] : []),
    ]),
    element("div", { class: "scrolled" }, [table]), panel, element("p", { class: "legend", text: data.note }));

  function filter() {
    const wanted = search.value.toLowerCase();
    state.shown = rows.map((_, i) => i).filter((i) => {
      const row = rows[i];
      return (!state.task || row.task === tasks[state.task]) && (!state.outcome || outcomeOf(row) === outcomes[state.outcome]) &&
        (!wanted || `${row.prompt}\n${row.response}\n${row.target}`.toLowerCase().includes(wanted));
    });
    state.page = 0;
    list();
  }

  function list() {
    const pages = Math.max(1, Math.ceil(state.shown.length / PAGE_ROWS));
    state.page = (state.page + pages) % pages;
    const shown = state.shown.slice(state.page * PAGE_ROWS, (state.page + 1) * PAGE_ROWS);
    body.replaceChildren(...shown.map((i) => {
      const row = rows[i];
      const cells = [row.task, row.sample_id, outcomeOf(row), row.response, row.target].map((value) => element("td", { text: short(value), dir: "auto" }));
      const line = element("tr", { class: outcomeOf(row).replace(" ", "-") }, cells);
      line.sample = i;
      return line;
    }));
    count.textContent = `${shown.length ? state.page * PAGE_ROWS + 1 : 0} to ${state.page * PAGE_ROWS + shown.length} of ${state.shown.length}`;
    if (!shown.includes(state.chosen)) state.chosen = shown[0] ?? -1;
    choose(state.chosen);
  }

  function choose(i) {
    state.chosen = i;
    for (const line of body.rows) line.toggleAttribute("data-cursor", line.sample === i);
    detail();
  }

  function detail() {
    const row = rows[state.chosen];
    if (!row) return panel.replaceChildren("No sample fits.");
    const nodes = [element("h4", { text: `${row.task}, sample ${row.sample_id}: ${outcomeOf(row)}` })];
    const at = run ? data.sample_sequence.indexOf(state.chosen) : -1;
    const part = at >= 0 && run.starts[at] < run.starts[at + 1] ? at : -1; // -1: there is no token of its prompt to show
    const shared = part < 0 ? 0 : run.position[run.starts[part]];
    if (shared) nodes.push(element("p", { class: "legend", text: `Before it: ${shared.toLocaleString("en")} tokens of examples that samples share.` }));
    if (part >= 0) nodes.push(text.node, readout);
    else nodes.push(element("pre", { text: row.prompt, dir: "auto" }));
    nodes.push(element("p", {}, ["answer ", element("b", { text: row.response ?? "–", dir: "auto" }), ", target ", element("b", { text: row.target ?? "–", dir: "auto" })]));
    if (row.choices) {
      nodes.push(element("ul", {}, row.choices.map((choice, i) => element("li", {
        text: `${choice}: log p ${row.logprobs?.[i]?.toFixed(3) ?? "–"}${i === row.gold ? " (right)" : ""}`, dir: "auto",
      }))));
    }
    panel.replaceChildren(...nodes);
    if (part >= 0) text.lay(run.starts[part], run.starts[part + 1]);
    if (part >= 0) read(run.starts[part]);
  }

  function read(token) {
    text.mark(token);
    readout.replaceChildren(...factNodes(factsOf(run, token, state.layer)));
  }

  function setLayer(layer) {
    state.layer = clamp(layer, run.layers.length);
    slider.show(state.layer);
    text.repaint();
    if (text.first < text.last) read(text.cursor);
  }

  const short = (value) => {
    const text = String(value ?? "–");
    return text.length > 60 ? `${text.slice(0, 60)}…` : text;
  };
  table.addEventListener("click", (/** @type {any} */ event) => { const line = event.target.closest("tr"); if (line?.sample !== undefined) choose(line.sample); });
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const lines = [...body.rows], at = lines.findIndex((line) => line.sample === state.chosen);
    const next = lines[clamp(at + step, lines.length)];
    if (next) { choose(next.sample); next.scrollIntoView({ block: "nearest" }); }
  });
  search.addEventListener("input", filter);
  text?.listen({
    go: (token) => { read(token); text.reveal(token); },
    turn: (by) => { setLayer(state.layer + by); tell({ layer: run.layers[state.layer] }); },
    point: read,
  });
  slider?.show(state.layer);
  filter();
}
