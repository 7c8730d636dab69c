// @ts-check
// A scrolled text of tokens. Spans are made for what comes near, and painted first for what is in sight.

import { chooserOf, clamp, element, sliderOver } from "./dom.js";
import { heldBy } from "./linked.js";
import { visibleText } from "./routing.js";

const BLOCK = 200; // tokens of a block, at least; it ends at a line end or at a space where there is one
const SETTLED = 60; // ms without another repaint, after which what is near but out of sight is painted too

export class TokenText {
  first = 0;
  last = 0;
  cursor = 0;
  blocks = [];
  near = new Set();
  painting = 0;
  timer = 0;

  /** `look(token)` gives the class names of a token; `label` says what the text is to who does not see it. */
  constructor(frame, run, label, look) {
    this.run = run;
    this.look = look;
    this.node = element("div", { class: "text", tabindex: 0, role: "group", "aria-label": label });
    this.observer = new IntersectionObserver((entries) => this.come(entries), { root: this.node, rootMargin: "160px" });
    addEventListener("beforeprint", heldBy(frame, () => this.paintAll(this.blocks)), { signal: frame.gone });
  }

  /** Show the tokens from `first` to before `last`, from their beginning. */
  lay(first, last) {
    this.observer.disconnect();
    this.blocks = blocksOf(this.run, first, last).map(([start, stop]) => this.plainBlock(start, stop));
    this.node.replaceChildren(...this.blocks);
    this.node.scrollTop = 0;
    Object.assign(this, { first, last, cursor: first, near: new Set(this.blocks.slice(0, 2)) });
    for (const block of this.blocks) this.observer.observe(block);
    this.paintAll(this.near);
  }

  /** Paint every token anew that was painted: what is in sight at once, the rest when nothing else is asked for. */
  repaint() {
    this.painting++;
    const box = this.node.getBoundingClientRect();
    const inSight = [...this.near].map((block) => [block, ...spansBetween(block.spans, box.top, box.bottom)]);
    for (const [block, from, to] of inSight) this.paint(block, from, to);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.paintAll(this.near), SETTLED);
  }

  /** Put the cursor on a token. */
  mark(token) {
    this.spanOf(this.cursor)?.removeAttribute("data-cursor");
    this.cursor = token;
    this.spanOf(token)?.setAttribute("data-cursor", "");
  }

  /** Scroll the text, and nothing round it, until a token is in sight. */
  reveal(token) {
    const box = this.node.getBoundingClientRect(), span = this.spanOf(token);
    const outside = ({ top, bottom }) => top < box.top || bottom > box.bottom;
    if (!outside(span.getBoundingClientRect())) return;
    const at = this.blocks.indexOf(this.blockOf(token));
    const around = this.blocks.slice(Math.max(0, at - 2), at + 3);
    for (const block of around) block.classList.add("laid"); // with its true height, before that is measured
    this.paintAll(around);
    this.near.add(this.blocks[at]); // the observer says so only at the next frame
    this.node.scrollTop += span.getBoundingClientRect().top - box.top - box.height / 2;
  }

  /** Hear what is asked for: go(token) by key, turn(layers) by key, point(token), press(token), and `keys` of one's own. */
  listen({ go, turn, point, press = (token) => {}, keys: own = {} }) {
    const inside = (token) => go(this.first + clamp(token - this.first, this.last - this.first));
    const keys = {
      ArrowLeft: () => inside(this.cursor - 1),
      ArrowRight: () => inside(this.cursor + 1),
      Home: () => inside(this.first),
      End: () => inside(this.last - 1),
      ArrowUp: () => turn(-1),
      ArrowDown: () => turn(1),
      ...own,
    };
    this.node.addEventListener("keydown", (event) => {
      if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey || this.first === this.last) return;
      event.preventDefault();
      keys[event.key]();
    });
    for (const [name, told] of [["pointerover", point], ["click", press]]) {
      this.node.addEventListener(name, (/** @type {any} */ { target }) => { if (target.token !== undefined) told(target.token); });
    }
  }

  // Blocks: plain text until they come near, then a span a token

  plainBlock(start, stop) {
    let plain = "";
    for (let token = start; token < stop; token++) plain += visibleText(this.run.piece(token));
    return Object.assign(element("div", { class: "block", text: plain }), { range: [start, stop], painted: -1, spans: null });
  }

  come(entries) {
    for (const { target, isIntersecting } of entries) this.near[isIntersecting ? "add" : "delete"](target);
    this.paintAll(this.near);
  }

  paintAll(blocks) {
    for (const block of blocks) {
      if (block.painted === this.painting) continue;
      if (!block.spans) this.fill(block);
      this.paint(block, 0, block.spans.length);
      block.painted = this.painting;
    }
  }

  paint({ spans, range: [start] }, from, to) {
    for (let i = from; i < to; i++) {
      const name = this.look(start + i);
      if (spans[i].className !== name) spans[i].className = name;
    }
  }

  fill(block) {
    const [start, stop] = block.range, nodes = [];
    block.spans = [];
    for (let token = start; token < stop; token++) {
      const piece = this.run.piece(token);
      const span = Object.assign(document.createElement("span"), { token, textContent: visibleText(piece) });
      block.spans.push(span);
      nodes.push(span);
      if (piece.includes("\n") && token < stop - 1) nodes.push(document.createElement("br"));
    }
    block.replaceChildren(...nodes);
  }

  blockOf(token) {
    return this.blocks.find(({ range }) => token >= range[0] && token < range[1]);
  }

  spanOf(token) {
    const block = this.blockOf(token);
    if (block && !block.spans) this.paintAll([block]);
    return block?.spans[token - block.range[0]];
  }
}

/** The blocks [start, stop) that the tokens from `first` to before `last` are laid out in. */
function blocksOf(run, first, last) {
  const blocks = [];
  for (let start = first, stop; start < last; start = stop) {
    const least = Math.min(last, start + BLOCK), most = Math.min(last, start + 2 * BLOCK);
    stop = most === last && last - start <= 1.5 * BLOCK ? last : least;
    for (let token = least; stop < last && token < most; token++) {
      if (run.piece(token - 1).includes("\n")) { stop = token; break; }
      if (stop === least && run.piece(token).startsWith(" ") && token > least) stop = token;
    }
    blocks.push([start, stop]);
  }
  return blocks;
}

/** [from, to) of the spans that lie between two heights; they are in reading order, so that two bisections find them. */
function spansBetween(spans, top, bottom) {
  const firstWhere = (holds) => {
    let low = 0, high = spans.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (holds(spans[middle].getBoundingClientRect())) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  return [firstWhere((box) => box.bottom > top), firstWhere((box) => box.top >= bottom)];
}

/** Class names of a token that show its first and second choice at a layer. */
export function choiceLook(run, token, layer) {
  const first = `t e${run.expert(token, 0, layer)}`;
  return run.topK > 1 ? `${first} s${run.expert(token, 1, layer)}` : first;
}

/** Chooser of the sequence and slider of the layer, for a view with setSequence, setLayer and tell. */
export function placeControls(view, { labels, domains, layers }) {
  const chooser = chooserOf("sequence", labels, (index) => {
    view.setSequence(index);
    if (domains[index] !== null) view.tell({ domain: domains[index] });
  });
  const slider = sliderOver("layer", layers, (index) => {
    view.setLayer(index);
    view.tell({ layer: layers[index] });
  });
  return { chooser, slider, nodes: [labels.length > 1 ? chooser : element("span", { text: labels[0] }), slider] };
}

/** Go where another view went, in a view with setSequence and setLayer. */
export function follow(view, { layers, domains }, { layer, domain }) {
  if (layers.includes(layer)) view.setLayer(layers.indexOf(layer));
  if (domains.includes(domain) && domains[view.sequence] !== domain) view.setSequence(domains.indexOf(domain));
}
