// @ts-check
// The token view: a text underlined by its experts, with a readout of the token under the cursor.

import { shadeLook } from "./colours.js";
import { chooserOf, clamp, element, expertButtons, stepButtons } from "./dom.js";
import { link } from "./linked.js";
import { factNodes, factsOf, routing } from "./routing.js";
import { choiceLook, follow, placeControls, TokenText } from "./text.js";

const RED = "#bd1f01", BLUE = "#3f90da";

export class TokenView {
  sequence = 0;
  focus = -1;
  mode = 0;
  pinned = false;
  hits = new Set();

  constructor(frame, data) {
    this.data = data;
    this.run = routing(data);
    this.layer = data.layer;
    this.tell = link(frame, (told) => this.follow(told));
    this.shadings = shadingsOf(this.run, data.colours);
    this.text = new TokenText(frame, this.run,
      "Tokens. Left and right arrow keys move from token to token, up and down from layer to layer.", (token) => this.look(token));
    this.readout = element("div", { class: "readout", "aria-live": "polite" });
    this.strip = layerStrip(this.run, (layer) => this.chooseLayer(layer));
    this.legend = element("p", { class: "legend" });
    frame.append(this.controls(), this.text.node, this.readout, this.strip, this.legend);
    this.listen();
    this.place.slider.show(this.layer);
    this.setSequence(0);
  }

  controls() {
    this.place = placeControls(this, this.data);
    const digits = element("input", { type: "checkbox" });
    digits.addEventListener("change", () => this.text.node.classList.toggle("digits", digits.checked));
    this.experts = expertButtons(this.run.nExperts, (expert) => {
      this.setFocus(this.focus === expert ? -1 : expert);
      this.tell({ expert: this.focus < 0 ? null : this.focus });
    });
    const go = (token) => this.moveTo(token);
    this.strongest = stepper("strongest", "token where the expert is strongest at this layer", () =>
      strongestTokens(this.run, this.text, this.focus, this.layer), go);
    const shading = chooserOf("colour", this.shadings.map(({ name }) => name), (index) => { this.mode = index; this.shade(); });
    return element("div", { class: "controls" }, [
      ...this.place.nodes, element("label", {}, [digits, " digits"]), this.experts, this.strongest, this.searching(go),
      ...(this.shadings.length > 1 ? [shading] : []),
    ]);
  }

  searching(go) {
    const search = element("input", { type: "search", placeholder: "search", "aria-label": "search the text; Enter for the next", size: 12 });
    this.found = stepper("", "token with what was searched for", () => {
      const { starts, tokens } = searched(this.run, this.text, search.value.toLowerCase());
      this.hits = tokens;
      this.text.repaint();
      return starts;
    }, go);
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      this.found.hidden = false;
      this.found.go(event.shiftKey ? -1 : 1);
    });
    search.addEventListener("input", () => {
      this.found.reset();
      if (search.value) return;
      this.found.hidden = true;
      this.hits = new Set();
      this.text.repaint();
    });
    return element("span", { class: "search" }, [search, this.found]);
  }

  listen() {
    this.text.listen({
      go: (token) => this.moveTo(token),
      turn: (by) => this.chooseLayer(this.layer + by),
      point: (token) => { if (!this.pinned) this.read(token); },
      press: (token) => {
        this.pinned = !(this.pinned && token === this.text.cursor);
        this.read(token);
      },
      keys: { Enter: () => { this.pinned = !this.pinned; }, Escape: () => { this.pinned = false; } },
    });
  }

  follow(told) {
    if (told.expert !== undefined && (told.expert ?? -1) < this.run.nExperts) this.setFocus(told.expert ?? -1);
    follow(this, this.data, told);
  }

  setSequence(index) {
    const { starts } = this.run;
    this.sequence = index;
    this.place.chooser.show(index);
    this.pinned = false;
    this.hits = new Set();
    this.strongest.reset();
    this.found.reset();
    this.text.lay(starts[index], starts[index + 1]);
    this.shade();
    this.read(starts[index]);
  }

  setLayer(layer) {
    this.layer = clamp(layer, this.run.layers.length);
    this.place.slider.show(this.layer);
    this.strongest.reset();
    this.text.repaint();
    this.read(this.text.cursor);
  }

  chooseLayer(layer) {
    this.setLayer(layer);
    this.tell({ layer: this.run.layers[this.layer] });
  }

  setFocus(expert) {
    this.focus = expert;
    this.experts.show(expert);
    this.strongest.reset();
    this.strongest.hidden = expert < 0;
    this.shade();
  }

  /** Shade the tokens anew, and say by what. */
  shade() {
    const { first, last } = this.text, n = last - first, shading = this.shadings[this.mode];
    this.text.node.style.setProperty("--tint", shading.colour(this.focus));
    this.text.repaint();
    this.legend.textContent = `n = ${n.toLocaleString("en")} ${n === 1 ? "token" : "tokens"} of this sequence. Thick underline: first choice` +
      `${this.run.topK > 1 ? "; thin: second." : "."} ${shading.scale(this.focus)} Hover, click (to hold) or use the arrow keys.`;
  }

  look(token) {
    let name = choiceLook(this.run, token, this.layer);
    const share = this.shadings[this.mode].share(token, this.focus, this.layer);
    if (!Number.isNaN(share)) name += shadeLook(Math.abs(share)) + (share < 0 ? " down" : "");
    else if (this.focus >= 0 && this.mode === 0) name += " off";
    if (this.run.arrays.phase?.[token]) name += " generated";
    return this.hits.has(token) ? `${name} hit` : name;
  }

  read(token) {
    this.strip.hidden = this.text.first === this.text.last;
    if (this.strip.hidden) return this.readout.replaceChildren("This sequence has no tokens.");
    this.text.mark(token);
    this.readout.replaceChildren(...factNodes(factsOf(this.run, token, this.layer)));
    this.strip.show(token, this.layer);
  }

  moveTo(token) {
    this.read(token);
    this.pinned = true;
    this.text.reveal(token);
  }
}

/** What the ground of a token can show: share(token, focus, layer) from -1 to 1 or NaN for nothing, its colour, its scale. */
function shadingsOf(run, colours) {
  const { arrays, topK, nExperts } = run;
  const sumOver = (name) => (token, focus, layer) => {
    let sum = NaN;
    for (let slot = 0; slot < topK; slot++) {
      if (focus >= 0 && run.expert(token, slot, layer) !== focus) continue;
      sum = (Number.isNaN(sum) ? 0 : sum) + run.added(name, token, slot, layer);
    }
    return sum / (127 * run.steps[name]);
  };
  const whose = (focus) => (focus < 0 ? "all choices together" : `expert ${focus}`);
  const end = (name) => (127 * run.steps[name]).toPrecision(2);
  const blue = () => BLUE;
  const shadings = [{
    name: "experts",
    share: (token, focus, layer) => {
      const slot = focus < 0 ? -1 : run.slotOf(token, focus, layer);
      return slot < 0 ? NaN : arrays.weight ? run.weight(token, slot, layer) : 0.5;
    },
    colour: (focus) => colours[focus] ?? BLUE,
    scale: (focus) => "",
  }];
  if (arrays.entropy) {
    const most = Math.log2(nExperts);
    shadings.push({ name: "router entropy", share: (token, focus, layer) => run.entropy(token, layer) / most, colour: blue,
      scale: () => `Blue: router entropy, 0 to ${most.toFixed(1)} bits.` });
  }
  if (arrays.surprise) {
    shadings.push({ name: "surprise", share: (token) => Math.abs(run.logprob(token)) / 10, colour: () => RED,
      scale: () => "Red: surprise, −log p, 0 to 10 nat." });
  }
  if (arrays.norm) {
    shadings.push({ name: "output norm", share: sumOver("norm"), colour: blue,
      scale: (focus) => `Blue: norm of the weighted output, ${whose(focus)}, 0 to ${end("norm")}.` });
  }
  if (arrays.logit) {
    shadings.push({ name: "logit added", share: sumOver("logit"), colour: blue,
      scale: (focus) => `Blue: raises the next token's logit, red: lowers it, ${whose(focus)}; full at ±${end("logit")}.` });
  }
  return shadings;
}

/** A button a layer with the first choice in it; `strip.show(token, layer)` shows those of a token. */
function layerStrip(run, chosen) {
  const cells = run.layers.map((number, layer) => {
    const cell = element("button", { type: "button", tabindex: -1, title: `layer ${number}` });
    cell.addEventListener("click", () => chosen(layer));
    return cell;
  });
  const strip = element("div", { class: "strip", role: "group", "aria-label": "first choice in every layer" }, cells);
  strip.show = (token, layer) => cells.forEach((cell, i) => {
    cell.textContent = String(run.expert(token, 0, i));
    cell.className = choiceLook(run, token, i).replace("t ", "cell ");
    if (i === layer) cell.setAttribute("aria-current", "true");
    else cell.removeAttribute("aria-current");
  });
  return strip;
}

/** Buttons to step through tokens, which `list` finds when they are first asked for; `stepper.reset()` forgets them. */
function stepper(name, what, list, go) {
  const output = element("output", {});
  const node = element("span", { class: "stepper" }, [name, ...stepButtons(what, (by) => node.go(by)), output]);
  let tokens = null, at = -1;
  node.hidden = true;
  node.reset = () => { tokens = null; output.textContent = ""; };
  node.go = (by) => {
    if (!tokens) {
      tokens = list();
      at = by > 0 ? -1 : 0;
    }
    if (!tokens.length) { output.textContent = "0 tokens"; return; }
    at = (at + by + tokens.length) % tokens.length;
    output.textContent = `${(at + 1).toLocaleString("en")} of ${tokens.length.toLocaleString("en")}`;
    go(tokens[at]);
  };
  return node;
}

/** Tokens from `first` to before `last` that chose `expert` at `layer`, the largest weight first. */
function strongestTokens(run, { first, last }, expert, layer) {
  const chosen = [];
  for (let token = first; token < last; token++) {
    const slot = run.slotOf(token, expert, layer);
    if (slot >= 0) chosen.push([run.arrays.weight ? run.weight(token, slot, layer) : -slot, token]);
  }
  return chosen.sort((a, b) => b[0] - a[0] || a[1] - b[1]).map(([, token]) => token);
}

/** Tokens where `wanted` starts, and all tokens that it lies on: it is searched over the text, so it may span some. */
function searched(run, { first, last }, wanted) {
  const ends = [], starts = [], tokens = new Set();
  let whole = "";
  for (let token = first; token < last; token++) { whole += run.piece(token).toLowerCase(); ends.push(whole.length); }
  for (let at = whole.indexOf(wanted), i = 0; at >= 0 && wanted; at = whole.indexOf(wanted, at + wanted.length)) {
    while (ends[i] <= at) i++;
    starts.push(first + i);
    for (let j = i; j < ends.length && (j === i || ends[j - 1] < at + wanted.length); j++) tokens.add(first + j);
  }
  return { starts, tokens };
}
