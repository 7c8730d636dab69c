// @ts-check
// What the views of tokens share: reading packed routing, and saying what a token was given.

import { element } from "./dom.js";

/** Accessors over packed token planes; `layer` is an index into data.layers. */
export function routing(data) {
  const { arrays, layers, starts, n_experts: nExperts, top_k: topK } = data;
  const nTokens = starts[starts.length - 1];
  const plane = (slot, layer) => (slot * layers.length + layer) * nTokens;
  const kept = data.shapes.weight?.[1][0] ?? 0;
  const position = Int32Array.from(arrays.step);
  for (let i = 1; i < nTokens; i++) position[i] += position[i - 1];

  const expert = arrays.pair
    ? (token, slot, layer) => {
      const pair = arrays.pair[layer * nTokens + token];
      return slot ? pair % nExperts : Math.floor(pair / nExperts);
    }
    : (token, slot, layer) => arrays.expert[plane(slot, layer) + token];
  const stored = (token, slot, layer) => arrays.weight[plane(slot, layer) + token] / 100;
  const weight = (token, slot, layer) => {
    if (kept === topK) return stored(token, slot, layer);
    return slot ? stored(token, 0, layer) : 1 - stored(token, 0, layer); // of two that sum to one the second is kept
  };
  const slotOf = (token, wanted, layer) => {
    for (let slot = 0; slot < topK; slot++) if (expert(token, slot, layer) === wanted) return slot;
    return -1;
  };
  const entropy = (token, layer) => (arrays.entropy[layer * nTokens + token] / 31) * Math.log2(nExperts);
  const logprob = (token) => (arrays.surprise[token] === 65535 ? NaN : -arrays.surprise[token] / 100);
  const added = (name, token, slot, layer) => {
    const value = arrays[name][plane(slot, layer) + token];
    return value === -128 ? NaN : value * data.steps[name];
  };
  const piece = (token) => (arrays.piece ? data.pieces[arrays.piece[token]] : `t${position[token]}`);
  return { ...data, nTokens, nExperts, topK, position, expert, weight, slotOf, entropy, logprob, added, piece };
}

/** [name, value, expert?] of everything known of a token at a layer. */
export function factsOf(run, token, layer) {
  const { arrays, topK } = run;
  const facts = [["token", quoted(run.piece(token))]];
  if (arrays.token_id) facts.push(["id", String(arrays.token_id[token])]);
  facts.push(["position", String(run.position[token])]);
  for (let slot = 0; slot < topK; slot++) {
    const e = run.expert(token, slot, layer);
    const said = [];
    if (arrays.weight) said.push(`weight ${run.weight(token, slot, layer).toFixed(2)}`);
    if (arrays.logit) said.push(`${signed(run.added("logit", token, slot, layer))} logit`);
    if (arrays.norm) said.push(`norm ${run.added("norm", token, slot, layer).toPrecision(2)}`);
    facts.push([["first", "second"][slot] ?? `choice ${slot + 1}`, said.length ? `${e} (${said.join(", ")})` : String(e), e]);
  }
  if (arrays.entropy) facts.push(["router entropy", `${run.entropy(token, layer).toFixed(1)} bits`]);
  if (arrays.surprise) {
    const value = run.logprob(token);
    const shown = Number.isNaN(value) ? "none (first token)" : `${value.toFixed(2)} nat (p = ${Math.exp(value).toPrecision(2)})`;
    facts.push(["log-probability", shown]);
  }
  if (arrays.phase?.[token]) facts.push(["phase", "generated"]);
  return facts;
}

export function factNodes(facts) {
  return facts.map(([name, value, e]) => element("span", { class: "fact" }, [
    ...(name ? [element("span", { class: "name", text: name })] : []),
    ...(e === undefined ? [] : [element("i", { class: `swatch e${e}` })]),
    element("b", { text: value, dir: "auto" }),
  ]));
}

export const signed = (value) => (Number.isNaN(value) ? "no" : `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(2)}`);

const LONGEST = 80; // characters of one token shown in the text

export function visibleText(piece) {
  const shown = piece.replace(/\n/g, "⏎").replace(/\t/g, "→").replace(/\r/g, "␍");
  if (shown.length > LONGEST) return `${shown.slice(0, LONGEST)}… (${piece.length.toLocaleString("en")} characters)`;
  return shown || "·";
}

export function quoted(piece) {
  if (piece === "") return "(part of a character)";
  const shown = JSON.stringify(piece);
  return shown.length > 300 ? `${shown.slice(0, 300)}… (${piece.length.toLocaleString("en")} characters)` : shown;
}
