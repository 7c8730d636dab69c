// @ts-check
// Two runs over the same tokens, side by side under one cursor.

import { chooserOf, clamp, element, stepButtons } from "./dom.js";
import { link } from "./linked.js";
import { factNodes, factsOf, routing } from "./routing.js";
import { choiceLook, follow, placeControls, TokenText } from "./text.js";

/** @type {[string, (a: any, b: any, token: number, layer: number) => boolean][]} */
const CHANGES = [
  ["first choice", (a, b, token, layer) => a.expert(token, 0, layer) !== b.expert(token, 0, layer)],
  ["set of experts", (a, b, token, layer) => {
    for (let slot = 0; slot < a.topK; slot++) if (b.slotOf(token, a.expert(token, slot, layer), layer) < 0) return true;
    return false;
  }],
];

export class DiffView {
  sequence = 0;
  change = 0;

  constructor(frame, data) {
    this.runs = data.runs.map((name) => ({ name, ...routing(ownData(data, name)) }));
    this.data = { ...data, layers: this.runs[0].layers };
    this.layer = data.layer;
    this.tell = link(frame, (told) => follow(this, this.data, told));
    this.place = placeControls(this, this.data);
    this.texts = this.runs.map((run) => new TokenText(frame, run,
      `${run.name}. Left and right arrow keys move from token to token, up and down from layer to layer.`,
      (token) => choiceLook(run, token, this.layer) + (this.changed(token) ? " changed" : "")));
    this.readouts = this.runs.map(() => element("div", { class: "readout" }));
    this.legend = element("p", { class: "legend", "aria-live": "polite" });
    const change = chooserOf("changed", CHANGES.map(([name]) => name), (index) => { this.change = index; this.repaint(); });
    frame.append(
      element("div", { class: "controls" }, [...this.place.nodes, change,
        element("span", { class: "stepper" }, ["changed ", ...stepButtons("changed token", (by) => this.jump(by))])]),
      element("div", { class: "halves" }, this.runs.map((run, i) =>
        element("section", {}, [element("h4", { text: run.name }), this.texts[i].node, this.readouts[i]]))),
      this.legend);
    for (const text of this.texts) {
      text.listen({
        go: (token) => this.moveTo(token),
        turn: (by) => {
          this.setLayer(this.layer + by);
          this.tell({ layer: this.data.layers[this.layer] });
        },
        point: (token) => this.read(token),
        press: (token) => this.moveTo(token),
      });
    }
    this.place.slider.show(this.layer);
    this.setSequence(0);
    if (this.range[0] < this.range[1] && !this.changed(this.range[0])) this.jump(1);
  }

  get range() {
    return this.runs[0].starts.slice(this.sequence, this.sequence + 2);
  }

  changed(token) {
    return CHANGES[this.change][1](this.runs[0], this.runs[1], token, this.layer);
  }

  setSequence(index) {
    this.sequence = index;
    this.place.chooser.show(index);
    for (const text of this.texts) text.lay(...this.range);
    this.read(this.range[0]);
    this.count();
  }

  setLayer(layer) {
    this.layer = clamp(layer, this.data.layers.length);
    this.place.slider.show(this.layer);
    this.repaint();
  }

  repaint() {
    for (const text of this.texts) text.repaint();
    this.read(this.texts[0].cursor);
    this.count();
  }

  /** Say how many tokens changed. */
  count() {
    const [first, last] = this.range;
    let n = 0;
    for (let token = first; token < last; token++) n += Number(this.changed(token));
    this.legend.textContent = `${n.toLocaleString("en")} of ${(last - first).toLocaleString("en")} tokens of this sequence have another ` +
      `${CHANGES[this.change][0]} at layer ${this.data.layers[this.layer]} (outlined). The cursor is in both texts.`;
  }

  read(token) {
    const [first, last] = this.range;
    if (first === last) return this.readouts.forEach((readout) => readout.replaceChildren("This sequence has no tokens."));
    this.texts.forEach((text, i) => {
      text.mark(token);
      this.readouts[i].replaceChildren(...factNodes(factsOf(this.runs[i], token, this.layer)));
    });
  }

  moveTo(token) {
    this.read(token);
    for (const text of this.texts) text.reveal(token);
  }

  /** Move to the next changed token, or to the one before; round the end. */
  jump(by) {
    const [first, last] = this.range, n = last - first, at = this.texts[0].cursor - first;
    for (let step = 1; step <= n; step++) {
      const token = first + ((((at + by * step) % n) + n) % n);
      if (this.changed(token)) return this.moveTo(token);
    }
  }
}

/** What one run has of the data: entries "run/array" under their own names. Of what both have, the second's is its difference. */
function ownData(data, name) {
  const own = (entries, run) => Object.fromEntries(Object.entries(entries)
    .filter(([key]) => key.startsWith(`${run}/`)).map(([key, value]) => [key.slice(run.length + 1), value]));
  const arrays = own(data.arrays, name), first = name === data.runs[0] ? {} : own(data.arrays, data.runs[0]);
  for (const [key, array] of Object.entries(arrays)) {
    const base = first[key];
    if (base?.length === array.length && base.constructor === array.constructor) arrays[key] = array.map((value, i) => value + base[i]);
  }
  return { ...data, ...data.of[name], arrays, shapes: own(data.shapes, name) };
}
