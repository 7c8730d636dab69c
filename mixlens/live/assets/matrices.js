// @ts-check
// Heat maps on one scale centred on what uniform routing gives: layer x expert by domain, expert x expert by layer.

import { chooserOf, clamp, drawn, element, sliderOver } from "./dom.js";
import { link } from "./linked.js";
import { factNodes } from "./routing.js";

/** `value` as the header's unit says it: a share in per cent, or a ratio. */
export function valueText(data, value) {
  if (Number.isNaN(value)) return "–";
  return data.unit === "ratio" ? `${value.toFixed(2)} ×` : `${(100 * value).toFixed(1)} %`;
}

export function intervalText(data, low, high) {
  return Number.isNaN(low) ? "no interval" : `${valueText(data, low)} to ${valueText(data, high)}`;
}

/** Fill of a cell: red above the centre, blue below, never so deep that text on it is hard to read. */
function fillOf(data, value) {
  if (Number.isNaN(value)) return "var(--line)";
  const far = data.unit === "ratio" ? Math.log2(Math.max(value, 1e-3)) : value - data.centre;
  const share = Math.min(1, Math.abs(far) / data.limit);
  return `color-mix(in srgb, ${far > 0 ? "#bd1f01" : "#3f90da"} ${Math.round(55 * share)}%, var(--ground))`;
}

export function matrix(frame, data) {
  const { picks, panels, row, column, arrays } = data;
  const state = { picked: picks.map((pick) => pick.start), panel: 0, row: 0, column: 0 };
  const area = row.values.length * column.values.length;
  const wide = column.values.length > 64 ? 7 : column.values.length > 16 && !data.digits ? 14 : 27;
  const tall = row.values.length > 64 ? 7 : row.values.length > 32 ? 10 : row.values.length > 12 ? 15 : 20;
  const every = ({ values }) => Math.ceil(values.length / (values.length > 32 ? 32 : 16)); // of so many rows or columns one is named
  const offset = (panel = state.panel) =>
    picks.reduce((at, pick, i) => at * pick.values.length + state.picked[i], 0) * panels.length * area + panel * area;
  const at = (panel, i, j) => offset(panel) + i * column.values.length + j;
  const axes = { [row.name]: ["row", row.values], [column.name]: ["column", column.values], domain: ["panel", panels] };
  const group = data.group ?? "domain";

  const tell = link(frame, (told) => {
    for (const [name, value] of Object.entries(told)) {
      const pick = picks.findIndex((p) => p.name === name);
      if (pick >= 0 && picks[pick].values.includes(value)) setPick(pick, picks[pick].values.indexOf(value));
      else if (axes[name]?.[1].includes(value)) state[axes[name][0]] = axes[name][1].indexOf(value);
    }
    mark();
  });
  const controls = picks.map((pick, i) => {
    const chosen = (index) => { setPick(i, index); mark(); tell({ [pick.name]: pick.values[index] }); };
    return pick.slider ? sliderOver(pick.name, pick.values, chosen) : chooserOf(pick.name, pick.values, chosen);
  });
  const readout = element("div", { class: "readout", "aria-live": "polite" });
  const grids = panels.map((name, panel) => gridOf(name, panel));
  const wanted = element("input", { type: "number", min: column.values[0], max: column.values.at(-1), "aria-label": "go to expert" });
  wanted.addEventListener("change", () => {
    const found = column.values.indexOf(Number(wanted.value));
    if (found >= 0) reach(state.panel, state.row, found);
  });
  const searched = column.values.length > 32 ? [element("label", {}, ["go to expert ", wanted])] : [];
  frame.append(
    element("div", { class: "controls" }, [...controls, ...searched]),
    element("div", { class: "grids", tabindex: 0, role: "group", "aria-label": `${data.title}. Arrow keys move from cell to cell.` },
      grids.map((grid) => grid.node)),
    scaleBar(data), readout, element("p", { class: "legend", text: data.note }));

  function gridOf(name, panel) {
    const left = 34, top = name === null ? 16 : 30;
    const width = left + column.values.length * wide + 4, height = top + row.values.length * tall + 18;
    const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    if (name !== null) svg.append(drawn("text", { class: "panel", x: 2, y: 12, text: name }));
    const cells = [], digits = [], small = data.digits;
    row.values.forEach((value, i) => {
      if (i % every(row) === 0) svg.append(drawn("text", { class: "tick", x: left - 5, y: top + (i + 0.7) * tall, "text-anchor": "end", text: value }));
      column.values.forEach((_, j) => {
        const place = { x: left + j * wide, y: top + i * tall };
        const cell = drawn("rect", { ...place, width: wide - 1, height: tall - 1, class: "box" });
        cell.place = [panel, i, j];
        cells.push(cell);
        if (small) digits.push(drawn("text", { class: "digit", x: place.x + wide / 2, y: place.y + tall * 0.7, "text-anchor": "middle" }));
      });
    });
    column.values.forEach((value, j) => {
      if (j % every(column)) return;
      svg.append(drawn("text", { class: "tick", x: left + (j + 0.5) * wide, y: top - 4, "text-anchor": "middle", text: value }));
    });
    svg.append(drawn("text", { class: "tick", x: left, y: height - 5, text: `${column.label} →` }));
    svg.append(drawn("text", { class: "tick", x: 2, y: top - 4, text: `${row.label}↓` }));
    const cursor = drawn("rect", { class: "cursor", width: wide, height: tall });
    svg.append(...cells, ...digits, cursor);
    return { node: svg, cells, digits, cursor, left, top, tall };
  }

  function setPick(index, value) {
    state.picked[index] = value;
    controls[index].show(value);
    paint();
  }

  function paint() {
    grids.forEach((grid, panel) => grid.cells.forEach((cell, c) => {
      const value = arrays.estimate[offset(panel) + c];
      cell.style.fill = fillOf(data, value);
      if (grid.digits[c]) {
        grid.digits[c].textContent = Number.isNaN(value) ? "" : data.unit === "ratio" ? value.toFixed(1) : (100 * value).toFixed(0);
        grid.digits[c].style.fontWeight = arrays.survives[offset(panel) + c] ? 700 : 400;
      }
    }));
  }

  function mark() {
    grids.forEach((grid, panel) => {
      grid.cursor.setAttribute("x", grid.left + state.column * wide - 0.5);
      grid.cursor.setAttribute("y", grid.top + state.row * grid.tall - 0.5);
      grid.cursor.style.opacity = panel === state.panel ? 1 : 0.35;
    });
    const here = at(state.panel, state.row, state.column);
    const value = arrays.estimate[here];
    const facts = [
      ...(panels[0] === null ? [] : [[group, String(panels[state.panel])]]),
      ...picks.map((pick, i) => [pick.name, String(pick.values[state.picked[i]])]),
      [row.label, String(row.values[state.row])],
      [column.label, String(column.values[state.column])],
      ["", `${valueText(data, value)} ${data.of}`],
    ];
    if (!Number.isNaN(value)) facts.push(["interval", intervalText(data, arrays.low[here], arrays.high[here])]);
    if (data.also && !Number.isNaN(value)) facts.push(["that is", `${valueText(data, value * data.also[0])} ${data.also[1]}`]);
    facts.push(["n", arrays.n[here].toLocaleString("en")]);
    readout.replaceChildren(...factNodes(facts));
  }

  function go(panel, i, j) {
    Object.assign(state, { panel: clamp(panel, panels.length), row: clamp(i, row.values.length), column: clamp(j, column.values.length) });
    mark();
    tell({
      ...(panels[0] === null ? {} : { domain: panels[state.panel] }),
      [row.name]: row.values[state.row],
      ...(column.name === "expert_j" ? {} : { [column.name]: column.values[state.column] }),
    });
  }

  /** Go there by keyboard, where the cell may have been scrolled away. */
  function reach(panel, i, j) {
    go(panel, i, j);
    grids[state.panel].cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  const grid = frame.querySelector(".grids");
  grid.addEventListener("click", (/** @type {any} */ event) => { if (event.target.place) go(...event.target.place); });
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0], ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], PageUp: [-1, 0, 0], PageDown: [1, 0, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    reach(state.panel + step[0], state.row + step[1], state.column + step[2]);
  });
  picks.forEach((pick, i) => controls[i].show(pick.start));
  paint();
  mark();
}

function scaleBar(data) {
  const ratio = data.unit === "ratio", below = ratio ? data.limit : Math.min(data.limit, data.centre); // no share is negative
  const steps = [-below, -below / 2, 0, data.limit / 2, data.limit].map((far) => (ratio ? 2 ** far : data.centre + far));
  return element("div", { class: "scale", "aria-hidden": "true" }, steps.map((value, i) => {
    const more = i === 4 ? "≥ " : ratio && i === 0 ? "≤ " : "";
    const box = element("span", { text: more + valueText(data, value) });
    box.style.background = fillOf(data, value);
    return box;
  }));
}
