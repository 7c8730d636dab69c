// What live views show and save as text, and how they read their data. Run by node --test, without a page.

import assert from "node:assert/strict";
import { test } from "node:test";
import { gzipSync } from "node:zlib";

import { intervalText, valueText } from "../../mixlens/live/assets/matrices.js";
import { csvCell } from "../../mixlens/live/assets/page.js";
import { unpack } from "../../mixlens/live/assets/payload.js";
import { tickText, ticksOf } from "../../mixlens/live/assets/plots.js";
import { quoted, routing, signed, visibleText } from "../../mixlens/live/assets/routing.js";

const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#:%/()*+-;,=.?@^_[{|}~";

/** Base-85 text of bytes, one group of four after the other; a last group of n bytes has n + 1 digits. */
function encoded(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 4) {
    const group = [...bytes.subarray(at, at + 4)], missing = 4 - group.length;
    let number = [...group, ...Array(missing).fill(0)].reduce((sum, byte) => sum * 256 + byte, 0);
    let digits = "";
    for (let i = 0; i < 5; i++) { digits = DIGITS[number % 85] + digits; number = Math.floor(number / 85); }
    text += digits.slice(0, 5 - missing);
  }
  return text;
}

function packed(header, arrays) {
  const places = {}, parts = [];
  let at = 0;
  for (const [name, [type, shape, array]] of Object.entries(arrays)) {
    const bytes = Buffer.from(array.buffer), gap = (8 - (at % 8)) % 8;
    places[name] = [type, shape, at + gap];
    parts.push(Buffer.alloc(gap), bytes);
    at += gap + bytes.length;
  }
  let json = Buffer.from(JSON.stringify({ ...header, arrays: places }));
  json = Buffer.concat([json, Buffer.from(" ".repeat((8 - ((json.length + 4) % 8)) % 8))]);
  const length = Buffer.alloc(4);
  length.writeUInt32LE(json.length);
  return encoded(gzipSync(Buffer.concat([length, json, ...parts])));
}

test("what was packed is unpacked, at any length of the stream", async () => {
  for (let n = 1; n < 9; n++) {
    const estimate = Float32Array.from({ length: n }, (_, i) => i / 3), expert = Uint16Array.from({ length: 2 * n }, (_, i) => 70 * i);
    const data = await unpack(packed({ title: "שלום 🙂" }, { expert: ["uint16", [2, n], expert], estimate: ["float32", [n], estimate] }));
    assert.equal(data.title, "שלום 🙂");
    assert.deepEqual(data.arrays.expert, expert);
    assert.deepEqual(data.arrays.estimate, estimate);
    assert.deepEqual(data.shapes.expert[1], [2, n]);
  }
});

test("experts and weights are those of the token, the slot and the layer", () => {
  // two layers, three tokens; a pair is first choice * experts + second, and only the second weight is kept
  const arrays = { pair: Uint8Array.of(1, 6, 11, 12, 3, 9), weight: Uint8Array.of(50, 40, 30, 20, 10, 0), step: Int32Array.of(0, 1, 5) };
  const run = routing({ arrays, shapes: { weight: ["uint8", [1, 2, 3]] }, layers: [0, 7], starts: [0, 3], n_experts: 4, top_k: 2, steps: {} });
  assert.deepEqual([0, 1, 2].map((t) => [run.expert(t, 0, 0), run.expert(t, 1, 0)]), [[0, 1], [1, 2], [2, 3]]);
  assert.deepEqual([0, 1, 2].map((t) => [run.expert(t, 0, 1), run.expert(t, 1, 1)]), [[3, 0], [0, 3], [2, 1]]);
  assert.deepEqual([run.weight(1, 0, 1), run.weight(1, 1, 1)], [0.9, 0.1]);
  assert.deepEqual([...run.position], [0, 1, 6]);
  assert.equal(run.slotOf(2, 1, 1), 1);
  assert.equal(run.slotOf(2, 0, 1), -1);
});

test("numbers are shown with their unit, and missing ones are not", () => {
  const share = { unit: "share" }, ratio = { unit: "ratio" };
  assert.equal(valueText(share, 0.1249), "12.5 %");
  assert.equal(valueText(ratio, 1.2345), "1.23 ×");
  assert.equal(intervalText(share, 0.1, 0.2), "10.0 % to 20.0 %");
  assert.doesNotMatch(valueText(share, NaN) + intervalText(share, NaN, NaN), /NaN|0/);
  assert.equal(signed(-0.123), "−0.12");
  assert.equal(signed(4), "+4.0");
  assert.doesNotMatch(signed(NaN), /NaN/);
});

test("ticks are round, within their range, and more than one", () => {
  for (const [low, high] of [[0, 1], [0.37, 0.41], [-3, 12], [0, 1e9], [5e-7, 9e-7]]) {
    const ticks = ticksOf(low, high);
    assert.ok(ticks.length >= 2 && ticks.length <= 11, `${low} to ${high}: ${ticks}`);
    assert.ok(ticks.every((tick) => tick >= low && tick <= high * (1 + 1e-5)), `${low} to ${high}: ${ticks}`);
    assert.ok(ticks.every((tick) => String(Math.abs(tick)).replace(/^[0.]+|\.|0+$|e.*/g, "").length <= 2));
  }
  assert.equal(tickText(123456), "123,456");
  assert.equal(tickText(3e8), "3e+8");
});

test("pieces of text are seen whatever they hold", () => {
  assert.equal(visibleText("a\n\tb"), "a⏎→b");
  assert.notEqual(visibleText(""), "");
  assert.ok(visibleText("x".repeat(5000)).length < 120);
  assert.equal(quoted(' "x"\n'), '" \\"x\\"\\n"');
});

test("a saved cell is never a formula, and is one cell", () => {
  for (const text of ["=1+1", "@SUM(A1)", "+cmd", "-cmd", "\tx"]) assert.match(csvCell(text), /^"?'/);
  assert.equal(csvCell("-1.5"), "-1.5");
  assert.equal(csvCell('a "b", c\nd'), '"a ""b"", c\nd"');
});
