// @ts-check
// Live views of mixlens, for notebooks, saved pages, the report and anywidget. No request, no library.

import { expertRules, shadeRules } from "./colours.js";
import { DiffView } from "./diff.js";
import { element } from "./dom.js";
import { CHANNEL, followTheme, hold, keepKeys, leave } from "./linked.js";
import { matrix } from "./matrices.js";
import { unpack } from "./payload.js";
import { dots, ecdf, pareto } from "./plots.js";
import { samples } from "./samples.js";
import { strip } from "./strip.js";
import { TokenView } from "./tokens.js";
import CSS from "./mixlens.css";

export { ready } from "./page.js";
export { unpack } from "./payload.js";

/** The views by kind: each draws `data` into a frame. */
const VIEWS = {
  dots, ecdf, matrix, pareto, samples, strip,
  diff: (frame, data) => new DiffView(frame, data),
  tokens: (frame, data) => new TokenView(frame, data),
};

/**
 * Put the live view of `kind` into the shadow root of `host`, over its static content, unless `free` says no by then.
 * @param {() => boolean | Promise<boolean>} free
 */
export async function mount(host, kind, packed, free = () => true) {
  const data = await unpack(packed);
  if (!await free()) return;
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const frame = element("div", { class: "frame" });
  hold(host, frame);
  followTheme(frame);
  root.replaceChildren(element("style", { text: CSS + expertRules(data.colours ?? []) + shadeRules() }), frame);
  if (data.title) frame.append(element("h3", { text: data.title }));
  try {
    VIEWS[kind](frame, data);
  } catch (error) {
    leave(host);
    root.replaceChildren(element("slot", {})); // the static content
    throw error;
  }
  const table = host.querySelector(":scope > table");
  if (table) frame.append(element("details", {}, [element("summary", { text: "As a table" }), table.cloneNode(true)]));
  keepKeys(frame);
  host.dataset.ready = "1";
}

/** The form for anywidget: what is selected in any view of the page is the widget's `selection`. */
export default {
  async render({ model, el }) {
    const host = element("div", { class: "mixlens" });
    el.append(host);
    let disposed = false, released; // a click is lost when its button is replaced between press and release
    host.addEventListener("pointerdown", ({ button }) => {
      if (button !== 0) return; // a context menu takes the release
      const ended = new AbortController();
      released = new Promise((done) => {
        const end = () => { ended.abort(); setTimeout(done); };
        for (const name of ["pointerup", "pointercancel"]) addEventListener(name, end, { signal: ended.signal });
      });
    });
    const free = async () => { await released; return !disposed; };
    const tell = (selection) => document.dispatchEvent(new CustomEvent(CHANNEL, { detail: { ...selection, from: model } }));
    let placed = 0; // where a text that grows was scrolled to; it is followed until the reader scrolls back
    const show = async () => {
      const before = model.get("kind") === "tokens" && host.shadowRoot?.querySelector(".text");
      const top = before && before.scrollTop;
      await mount(host, model.get("kind"), model.get("packed"), free);
      if (disposed) return;
      if (before) {
        const text = host.shadowRoot.querySelector(".text"), back = top < placed - 60;
        text.classList.add("whole");
        const place = () => { text.scrollTop = back ? top : text.scrollHeight; placed = back ? placed : text.scrollTop; };
        place();
        requestAnimationFrame(place); // blocks that came near have their spans by then
      }
      if (Object.keys(model.get("selection")).length) tell(model.get("selection")); // new data, same layer and expert
    };
    await show();
    const hear = (/** @type {CustomEvent} */ { detail: { from, ...selection } }) => {
      if (from === model) return;
      model.set("selection", { ...model.get("selection"), ...selection });
      model.save_changes();
    };
    document.addEventListener(CHANNEL, hear);
    const asked = () => tell(model.get("asked"));
    model.on("change:asked", asked);
    model.on("change:packed", show);
    return () => {
      disposed = true;
      document.removeEventListener(CHANNEL, hear);
      model.off("change:asked", asked);
      model.off("change:packed", show);
      leave(host);
    };
  },
};
