"""What the views of tokens cost a reader: size of a saved output, time to first paint, and a step of the layer slider.

A page of its own in headless Chromium, 1100 x 900, a text of 32 layers x top-2 with weights, entropies and
log-probabilities. A step is an input event on the slider; its time ends when the page is laid out, and again when the
frame is painted. First paint counts from the start of the navigation.

python benchmarks/viewing.py --out benchmarks/results/viewing.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from measuring import header, write
from playwright.sync_api import Browser, sync_playwright

from mixlens import view
from mixlens.trace.trace import Trace
from mixlens.view import View

sys.path.append(str(Path(__file__).parent.parent / "tests" / "show"))
from lab import CHROMIUM, FLAGS
from show_samples import make_trace

FIRST_PAINT = """new MutationObserver((_, watch) => {
    if (!document.querySelector("[data-ready]")) return;
    watch.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => { window.firstPaint = performance.now(); }));
}).observe(document, { subtree: true, childList: true, attributes: true });"""

STEPS = """async (n) => {
    const root = document.querySelector(".mixlens").shadowRoot;
    const slider = root.querySelector("input[type=range]"), most = Number(slider.max);
    const channel = new MessageChannel();
    const times = [];
    for (let i = 1; i <= n; i++) {
        await new Promise((done) => setTimeout(done, 100)); // what is out of sight is painted meanwhile
        await new Promise(requestAnimationFrame);
        const start = performance.now();
        slider.value = i % (most + 1);
        slider.dispatchEvent(new Event("input"));
        for (const text of root.querySelectorAll(".text")) text.lastElementChild.getBoundingClientRect();
        const laid = performance.now() - start;
        await new Promise((done) => { channel.port1.onmessage = done; channel.port2.postMessage(0); });
        times.push([laid, performance.now() - start]);
    }
    return times;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=62, help="of the slider, in each state of a view")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header()
    results = []
    with sync_playwright() as tool, TemporaryDirectory() as folder:
        browser = tool.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        measured_on["versions"]["chromium"] = browser.version
        for tokens in options.tokens:
            for name, made in views(tokens).items():
                found = measure(browser, made, Path(folder), options.steps)
                results.append({"view": name, "tokens": tokens, **found})
                print(json.dumps(results[-1]))
    write(options.out, "viewing", measured_on, {"results": results})


def views(tokens: int) -> dict[str, View]:
    trace = make_trace(domains=("arxiv",), documents=1, tokens=tokens, layers=32)
    return {"tokens": view.tokens(trace, layer=0), "diff": view.diff(trace, other_run(trace), layer=0)}


def other_run(trace: Trace) -> Trace:
    """The trace with a little noise in the router's logits, as another number format brings it."""
    logits = trace.read("router_logits") + np.random.default_rng(1).normal(0, 0.1, trace.read("router_logits").shape)
    ids = np.argsort(-logits, -1)[..., :2]
    weight = np.exp(np.take_along_axis(logits, ids, -1))
    tokens = {name: trace.read(name) for name in ("sequence", "token_id", "logprob")}
    return Trace.from_arrays(
        ids,
        n_experts=trace.n_experts,
        weight=weight / weight.sum(-1, keepdims=True),
        router_logits=logits,
        tokens=tokens,
        sequences=trace.sequences[["document_id", "domain"]],
    )


def measure(browser: Browser, made: View, folder: Path, steps: int) -> dict[str, Any]:
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.add_init_script(FIRST_PAINT)
    page.goto(made.save(folder / "view.html").as_uri())
    page.wait_for_function("window.firstPaint")
    found: dict[str, Any] = {
        "output_bytes": len(json.dumps({"text/html": made._repr_html_(), "text/plain": repr(made)}).encode()),
        "first_paint_ms": round(page.evaluate("window.firstPaint"), 1),
        "step": {},
    }
    for state, prepare in STATES.items():
        if made.kind != "tokens" and state != "plain":
            continue
        prepare(page)
        times = np.array(page.evaluate(STEPS, steps))
        found["step"][state] = {
            "n": steps,
            **{f"{name}_ms": summary(times[:, i]) for i, name in enumerate(("laid_out", "painted"))},
        }
    page.close()
    return found


def digits(page: Any) -> None:
    page.get_by_label("digits").click()


def focus(page: Any) -> None:
    page.get_by_role("button", name="3", exact=True).and_(page.locator("button.expert")).click()


STATES = {
    "plain": lambda page: None,
    "digits": digits,
    "digits and focus": focus,
    "focus": digits,  # off again
}


def summary(times: np.ndarray) -> dict[str, float]:
    return {name: round(float(np.percentile(times, q)), 1) for name, q in (("median", 50), ("p95", 95))}


if __name__ == "__main__":
    main()
