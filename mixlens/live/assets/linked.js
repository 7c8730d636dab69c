// @ts-check
// What ties a view to its page: the selection that views share, keys, the theme, and how it is let go.

export const leave = (host) => host.leaving?.abort();

// Nothing tells a view that a notebook replaced its output. What the page calls is held by the frame alone, so that a
// frame that is nowhere any more goes, and its data with it; then its listeners go too.
const forgotten = new FinalizationRegistry((leaving) => leaving.abort());

/** Let go what an earlier view of `host` listens to on the page; what `frame` will listen to goes with `frame.gone`. */
export function hold(host, frame) {
  leave(host);
  host.leaving = new AbortController();
  frame.gone = host.leaving.signal;
  forgotten.register(frame, host.leaving);
}

export function heldBy(frame, call) {
  (frame.held ??= []).push(call);
  return weakly(new WeakRef(call));
}

// In no function that knows the frame: closures made in one place hold what any of them needs.
const weakly = (held) => (...told) => held.deref()?.(...told);

export const CHANNEL = "mixlens-select";

/** Hear what other views on the page select, by apply({layer, expert, domain}); returns the function that tells them. */
export function link(frame, apply) {
  document.addEventListener(CHANNEL, heldBy(frame, ({ detail }) => {
    if (detail.from !== frame && frame.isConnected) apply(detail);
  }), { signal: frame.gone });
  return (selection) => document.dispatchEvent(new CustomEvent(CHANNEL, { detail: { ...selection, from: frame } }));
}

/** A notebook takes keys for its own commands unless they stop here; those with Ctrl or Meta are left to it. */
export function keepKeys(frame) {
  frame.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
}

/** Dark or light as the notebook says, else as the system says; follows when it changes. */
export function followTheme(frame) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = heldBy(frame, () => {
    const { jpThemeLight } = document.body.dataset;
    const code = document.body.className.match(/\bvscode-(dark|light|high-contrast)\b/)?.[1];
    const page = `${document.documentElement.className} ${document.body.className}`.match(/(?:^|\s)(dark|light)(?:\s|$)/)?.[1];
    const dark = jpThemeLight ? jpThemeLight === "false" : code ? code !== "light" : page ? page === "dark" : system.matches;
    frame.dataset.theme = dark ? "dark" : "light";
  });
  apply();
  system.addEventListener("change", apply, { signal: frame.gone });
  const watch = new MutationObserver(apply);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  watch.observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });
  frame.gone.addEventListener("abort", watch.disconnect.bind(watch));
}
