// @ts-check
// Dots with intervals, distribution curves, and points with a frontier; drawn in SVG, read by hover and by keys.

import { chooserOf, clamp, drawn, element, sliderOver } from "./dom.js";
import { link } from "./linked.js";
import { intervalText, valueText } from "./matrices.js";
import { factNodes } from "./routing.js";

const PLOT = { width: 640, left: 64, right: 16, top: 20, bottom: 34 };

/** Round numbers from `low` to `high`, about `count` of them. */
export function ticksOf(low, high, count = 5) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const ticks = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) ticks.push(Number(value.toPrecision(12)));
  return ticks;
}

const larger = (a, b) => (b > a ? b : a); // NaN is never larger
const plain = (value, digits) => value.toLocaleString("en", { maximumSignificantDigits: digits });
export const tickText = (value) => (Math.abs(value) >= 1e7 ? value.toExponential(0) : plain(value, 6));

/** A linear or logarithmic scale from data to pixels. */
function scaleOf([low, high], [from, to], log = false) {
  const f = log ? Math.log10 : (v) => v;
  const span = f(high) - f(low) || 1;
  const scale = (value) => from + ((f(value) - f(low)) / span) * (to - from);
  scale.ticks = log
    ? Array.from({ length: Math.floor(f(high)) - Math.ceil(f(low)) + 1 }, (_, i) => 10 ** (Math.ceil(f(low)) + i))
    : ticksOf(low, high);
  if (scale.ticks.length < 2) scale.ticks = [low, high].map((v) => Number(v.toPrecision(2)));
  return scale;
}

function axesOf(svg, x, y, height, names, { shareX = false } = {}) {
  const bottom = height - PLOT.bottom;
  for (const value of x.ticks) {
    svg.append(
      drawn("line", { class: "grid", x1: x(value), x2: x(value), y1: PLOT.top, y2: bottom }),
      drawn("text", { class: "tick", x: x(value), y: bottom + 13, "text-anchor": "middle", text: shareX ? `${tickText(100 * value)} %` : tickText(value) }));
  }
  for (const value of y?.ticks ?? []) {
    svg.append(
      drawn("line", { class: "grid", x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: y(value), y2: y(value) }),
      drawn("text", { class: "tick", x: PLOT.left - 5, y: y(value) + 3, "text-anchor": "end", text: tickText(value) }));
  }
  svg.append(drawn("text", { class: "tick", x: PLOT.width - PLOT.right, y: height - 5, "text-anchor": "end", text: names[0] }));
  if (names[1]) svg.append(drawn("text", { class: "tick", x: 2, y: 10, text: names[1] }));
}

const canvasOf = (height, label) =>
  drawn("svg", { class: "plot", viewBox: `0 0 ${PLOT.width} ${height}`, role: "group", tabindex: 0, "aria-label": label });

/** Share of every expert at a layer: the domain that is chosen with its interval, the others as faint dots. */
export function dots(frame, data) {
  const { layers, domains, experts, arrays, uniform } = data;
  const state = { layer: data.start, domain: 0, expert: 0 };
  const at = (domain, layer, expert) => (domain * layers.length + layer) * experts.length + expert;
  const height = PLOT.top + PLOT.bottom + 24 * experts.length;
  const most = arrays.estimate.reduce(larger, arrays.high.reduce(larger, uniform));
  const x = scaleOf([0, most * 1.05], [PLOT.left, PLOT.width - PLOT.right]);
  const tell = link(frame, (told) => {
    if (layers.includes(told.layer)) state.layer = layers.indexOf(told.layer);
    if (domains.includes(told.domain)) state.domain = domains.indexOf(told.domain);
    if (experts.includes(told.expert)) state.expert = experts.indexOf(told.expert);
    paint();
  });
  const slider = sliderOver("layer", layers, (index) => { state.layer = index; paint(); tell({ layer: layers[index] }); });
  const chooser = chooserOf(data.group, domains, (index) => { state.domain = index; paint(); tell({ domain: domains[index] }); });
  const svg = canvasOf(height, "Experts by share. Up and down arrow keys move from expert to expert.");
  const readout = element("div", { class: "readout", "aria-live": "polite" });
  frame.append(element("div", { class: "controls" }, [slider, ...(domains.length > 1 ? [chooser] : [])]), svg, readout,
    element("p", { class: "legend", text: data.note }));

  function paint() {
    slider.show(state.layer);
    chooser.show(state.domain);
    svg.replaceChildren();
    axesOf(svg, x, null, height, [`share ${data.of}`], { shareX: true });
    svg.append(drawn("line", { class: "uniform", x1: x(uniform), x2: x(uniform), y1: PLOT.top, y2: height - PLOT.bottom }));
    experts.forEach((expert, i) => {
      const y = PLOT.top + 24 * (i + 0.5), chosen = at(state.domain, state.layer, i);
      const band = drawn("rect", { class: i === state.expert ? "band chosen" : "band", x: 0, y: y - 12, width: PLOT.width, height: 24 });
      band.expert = i;
      svg.append(band, drawn("text", { class: "tick", x: PLOT.left - 8, y: y + 4, "text-anchor": "end", text: `expert ${expert}` }));
      domains.forEach((_, d) => {
        const value = arrays.estimate[at(d, state.layer, i)];
        if (d !== state.domain && !Number.isNaN(value)) svg.append(drawn("circle", { class: "faint", cx: x(value), cy: y, r: 3 }));
      });
      if (Number.isNaN(arrays.estimate[chosen])) return;
      if (!Number.isNaN(arrays.low[chosen])) {
        svg.append(drawn("line", { class: `stem e${expert}`, x1: x(arrays.low[chosen]), x2: x(arrays.high[chosen]), y1: y, y2: y }));
      }
      svg.append(drawn("circle", { class: `dot e${expert}`, cx: x(arrays.estimate[chosen]), cy: y, r: 5.5 }));
    });
    const here = at(state.domain, state.layer, state.expert);
    const value = arrays.estimate[here];
    const facts = [["expert", String(experts[state.expert]), experts[state.expert]], ["layer", String(layers[state.layer])]];
    if (domains.length > 1) facts.push([data.group, String(domains[state.domain])]);
    facts.push(["", `${valueText(data, value)} ${data.of}`]);
    facts.push(["interval", intervalText(data, arrays.low[here], arrays.high[here])]);
    if (data.also) facts.push(["that is", `${valueText(data, value * data.also[0])} ${data.also[1]}`]);
    facts.push(["n", arrays.n[here].toLocaleString("en")]);
    readout.replaceChildren(...factNodes(facts));
  }

  const choose = (i) => {
    state.expert = clamp(i, experts.length);
    paint();
    tell({ expert: experts[state.expert] });
  };
  svg.addEventListener("click", (/** @type {any} */ event) => { if (event.target.expert !== undefined) choose(event.target.expert); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(state.expert + step);
  });
  paint();
}

/** Share of requests that took at most so long, one curve a load. */
export function ecdf(frame, data) {
  const state = { metric: 0, curve: 0, at: 0.5 };
  const height = 300;
  const metrics = chooserOf("metric", data.metrics.map((m) => m.name), (index) => { state.metric = index; paint(); });
  const logged = element("input", { type: "checkbox" });
  const svg = canvasOf(height, "Latency curves. Left and right arrow keys move along the curve, up and down from curve to curve.");
  const key = element("div", { class: "key" });
  const readout = element("div", { class: "readout", "aria-live": "polite" });
  frame.append(element("div", { class: "controls" }, [metrics, element("label", {}, [logged, " logarithmic"])]), svg, key, readout,
    element("p", { class: "legend", text: data.note }));

  function paint() {
    const curves = data.metrics[state.metric].curves.map((curve) => ({ ...curve, values: data.arrays[curve.array] }));
    const all = curves.flatMap((curve) => [...curve.values]).filter((v) => v > 0);
    svg.replaceChildren();
    if (!all.length) return readout.replaceChildren("No request succeeded: there is no latency.");
    const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce(larger);
    const x = scaleOf(logged.checked ? [low, high] : [0, high], [PLOT.left, PLOT.width - PLOT.right], logged.checked);
    const y = scaleOf([0, 1], [height - PLOT.bottom, PLOT.top]);
    axesOf(svg, x, y, height, [`${data.metrics[state.metric].name} [s]`, "share of requests"]);
    state.curve = Math.min(state.curve, curves.length - 1);
    curves.forEach((curve, i) => {
      let path = "";
      curve.values.forEach((value, k) => { path += `${k ? "H" : `M${x(value)},${y(0)}`}${k ? x(value) : ""}V${y((k + 1) / curve.values.length)}`; });
      svg.append(drawn("path", { class: `curve e${i}${i === state.curve ? " chosen" : ""}`, d: path }));
    });
    key.replaceChildren(...factNodes(curves.map((curve, i) => ["", `${curve.label} (n = ${curve.values.length})`, i])));
    const { values, label } = curves[state.curve];
    if (!values.length) return readout.replaceChildren(`${label}: no request succeeded.`);
    const k = Math.max(0, Math.ceil(state.at * values.length) - 1);
    svg.append(drawn("circle", { class: `dot e${state.curve}`, cx: x(values[k]), cy: y((k + 1) / values.length), r: 4.5 }));
    readout.replaceChildren(...factNodes([["load", label, state.curve], ["", `${(100 * (k + 1) / values.length).toFixed(0)} % of ${values.length} requests within ${values[k].toPrecision(3)} s`]]));
  }

  const most = () => data.metrics[state.metric].curves.length;
  const keys = {
    ArrowLeft: () => { state.at = Math.max(0, state.at - 0.05); },
    ArrowRight: () => { state.at = Math.min(1, state.at + 0.05); },
    ArrowUp: () => { state.curve = (state.curve + most() - 1) % most(); },
    ArrowDown: () => { state.curve = (state.curve + 1) % most(); },
  };
  svg.addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
    paint();
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const y = ((event.clientY - box.top) / box.height) * height;
    state.at = Math.max(0, Math.min(1, 1 - (y - PLOT.top) / (height - PLOT.bottom - PLOT.top)));
    paint();
  });
  logged.addEventListener("change", paint);
  paint();
}

/** Points in two chosen measures, with the frontier of those that none beats in both. */
export function pareto(frame, data) {
  const state = { x: data.start[0], y: data.start[1], point: 0 };
  const height = 340, { measures, labels } = data;
  const choosers = ["x", "y"].map((axis) => chooserOf(axis, measures.map((m) => m.name), (index) => { state[axis] = index; paint(); }));
  const svg = canvasOf(height, "Points. Left and right arrow keys move from point to point.");
  const readout = element("div", { class: "readout", "aria-live": "polite" });
  frame.append(element("div", { class: "controls" }, choosers), svg, readout, element("p", { class: "legend", text: data.note }));
  const values = (measure, part = "estimate") => data.arrays[`${part}${measure}`];

  /** @returns {[number, number]} */
  function extent(measure) {
    const known = ["estimate", "low", "high"].flatMap((part) => [...(values(measure, part) ?? [])]).filter((v) => !Number.isNaN(v));
    const low = Math.min(...known), high = Math.max(...known), room = (high - low || Math.abs(high) || 1) * 0.1;
    return [low - room, high + room];
  }

  function frontier() {
    const better = (m, a, b) => (measures[m].higher ? values(m)[a] >= values(m)[b] : values(m)[a] <= values(m)[b]);
    const known = labels.map((_, i) => i).filter((i) => !Number.isNaN(values(state.x)[i] + values(state.y)[i]));
    return known.filter((i) => !known.some((j) => better(state.x, j, i) && better(state.y, j, i) &&
      (!better(state.x, i, j) || !better(state.y, i, j)))).sort((a, b) => values(state.x)[a] - values(state.x)[b]);
  }

  function paint() {
    choosers.forEach((chooser, i) => chooser.show(state[["x", "y"][i]]));
    svg.replaceChildren();
    const x = scaleOf(extent(state.x), [PLOT.left, PLOT.width - PLOT.right - 60]);
    const y = scaleOf(extent(state.y), [height - PLOT.bottom, PLOT.top + 12]);
    const named = (m) => `${measures[m].name} (${measures[m].higher ? "more" : "less"} is better)`;
    axesOf(svg, x, y, height, [named(state.x), named(state.y)]);
    const best = frontier();
    svg.append(drawn("polyline", { class: "frontier", points: best.map((i) => `${x(values(state.x)[i])},${y(values(state.y)[i])}`).join(" ") }));
    const names = []; // over what is drawn of all points
    labels.forEach((label, i) => {
      const [px, py] = [x(values(state.x)[i]), y(values(state.y)[i])];
      if (Number.isNaN(px + py)) return;
      for (const [axis, scale] of Object.entries({ x, y })) {
        const [low, high] = ["low", "high"].map((part) => scale(values(state[axis], part)?.[i] ?? NaN));
        if (Number.isNaN(low + high)) continue;
        svg.append(drawn("line", axis === "x" ? { class: `stem e${i}`, x1: low, x2: high, y1: py, y2: py } : { class: `stem e${i}`, x1: px, x2: px, y1: low, y2: high }));
      }
      const dot = drawn("circle", { class: `dot e${i}${best.includes(i) ? " best" : ""}`, cx: px, cy: py, r: i === state.point ? 7 : 5 });
      dot.point = i;
      svg.append(dot);
      names.push(drawn("text", { class: "tick named", x: px + 9, y: py - 6, text: label }));
    });
    svg.append(...names);
    const facts = [["", labels[state.point], state.point]];
    measures.forEach((measure, m) => {
      const value = values(m)[state.point], low = values(m, "low")?.[state.point] ?? NaN;
      const interval = Number.isNaN(low) ? " [no interval]" : ` [${plain(low, 4)}, ${plain(values(m, "high")[state.point], 4)}]`;
      facts.push([measure.name, Number.isNaN(value) ? "not measured" : `${plain(value, 4)}${interval}`]);
    });
    readout.replaceChildren(...factNodes(facts));
  }

  const choose = (i) => { state.point = (i + labels.length) % labels.length; paint(); };
  svg.addEventListener("click", (/** @type {any} */ event) => { if (event.target.point !== undefined) choose(event.target.point); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(state.point + step);
  });
  paint();
}
