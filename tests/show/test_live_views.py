"""What a page does with live views that fail, are replaced, or have sequences without tokens; in a real Chromium."""

from __future__ import annotations

import json

import numpy as np
import pytest
from show_samples import emptied_trace
from test_views import log_of

from mixlens import view
from mixlens.live.bundle import module_source
from mixlens.live.payload import pack
from mixlens.view import View

pytestmark = pytest.mark.browser

# A page that keeps the signals with which views listen to the whole page, and has the module.
PAGE = f"""async () => {{
    window.signals = [];
    const add = EventTarget.prototype.addEventListener;
    EventTarget.prototype.addEventListener = function (name, call, options) {{
        if (["mixlens-select", "beforeprint", "change"].includes(name) && options?.signal) signals.push(options.signal);
        return add.call(this, name, call, options);
    }};
    const blob = new Blob([{json.dumps(module_source())}], {{ type: "text/javascript" }});
    window.mixlens = await import(URL.createObjectURL(blob));
}}"""
# A stand-in for anywidget's model: `change` resolves when the view has taken new data.
WIDGET = """async (packed) => {
    const values = { kind: "tokens", packed, selection: {}, asked: {} }, calls = {};
    const on = (name, call) => { calls[name] = call; };
    const model = { get: (name) => values[name], set() {}, save_changes() {}, off() {}, on };
    window.dispose = await mixlens.default.render({ model, el: document.body });
    window.change = () => calls["change:packed"]();
    window.host = document.querySelector(".mixlens");
    window.frame = () => host.shadowRoot.querySelector(".frame");
}"""
PRESS = "button => host.dispatchEvent(new PointerEvent('pointerdown', { button, bubbles: true }))"


@pytest.fixture
def page(seen):
    seen.page.goto("about:blank")
    seen.page.evaluate(PAGE)
    return seen.page


@pytest.fixture
def widget(page, trace):
    page.evaluate(WIDGET, view.tokens(trace, 0).packed)
    return page


def listeners(page, of: str, event: str) -> list[str]:
    """`event`, once for everything that hears it on `of`, from the browser itself."""
    tool = page.context.new_cdp_session(page)
    found = tool.send("Runtime.evaluate", {"expression": of})["result"]["objectId"]
    names = [one["type"] for one in tool.send("DOMDebugger.getEventListeners", {"objectId": found})["listeners"]]
    tool.detach()
    return [name for name in names if name == event]


def test_a_view_that_throws_leaves_its_picture(seen, trace, tmp_path):
    whole = view.tokens(trace, 0)
    broken = View(whole.title, whole.kind, whole.static, pack({"layers": [0]}, {}))
    with seen.page.expect_console_message() as said:
        seen.page.goto(broken.save(tmp_path / "broken.html").as_uri())
    assert said.value.text.startswith("mixlens: the view stays a picture. TypeError")
    assert seen.page.locator(".mixlens img").bounding_box()["height"] > 50
    assert seen.page.locator(".mixlens[data-ready]").count() == 0


@pytest.mark.parametrize("kind", ["ecdf", "dots"])
def test_more_numbers_than_a_call_has_arguments_are_drawn(seen, tmp_path, kind):
    values = np.linspace(0.1, 1, 200_000, dtype=np.float32)
    values[5] = np.nan
    one = {"colours": ["#112233"], "note": ""}
    curves = {"metrics": [{"name": "end to end", "curves": [{"label": "load", "array": "v"}]}]}
    shares = {"layers": list(range(100_000)), "domains": ["all"], "experts": [0, 1], "start": 0, "uniform": 0.5}
    shares |= {"unit": "fraction", "of": "", "also": None}
    arrays = {"ecdf": {"v": values[6:]}, "dots": {"estimate": values, "low": values, "high": values, "n": values}}
    packed = pack(one | {"ecdf": curves, "dots": shares}[kind], arrays[kind])
    seen.page.goto(View("Many", kind, "<p>Picture</p>", packed).save(tmp_path / "many.html").as_uri())
    seen.page.wait_for_selector(".mixlens[data-ready]", state="attached")
    ticks = seen.page.locator(".mixlens svg .tick").all_text_contents()
    assert {"ecdf": "1", "dots": "100 %"}[kind] in ticks


def test_a_replaced_output_is_forgotten_with_its_listeners_and_data(page, trace):
    page.evaluate(
        """async (packed) => {
            const host = document.createElement("div");
            document.body.append(host);
            await mixlens.mount(host, "tokens", packed);
            window.held = new WeakRef(host.shadowRoot.querySelector(".frame"));
            document.body.dataset.jpThemeLight = "false";
        }""",
        view.tokens(trace, 0).packed,
    )
    page.wait_for_function("held.deref().dataset.theme === 'dark'")
    page.evaluate("gc()")
    assert page.evaluate("held.deref().isConnected && signals.length === 3 && !signals.some(s => s.aborted)")
    page.evaluate("document.body.replaceChildren()")
    page.wait_for_function("gc() || !held.deref() && signals.every(s => s.aborted)", polling=50, timeout=10_000)
    assert listeners(page, "document", "mixlens-select") == []


def test_a_widget_that_is_disposed_while_it_takes_data_stays_gone(widget):
    widget.evaluate("async () => { const taken = change(); dispose(); await taken; }")
    assert widget.evaluate("signals.length && signals.every(s => s.aborted)")
    assert listeners(widget, "document", "mixlens-select") == []


def test_new_data_waits_for_the_release_of_a_click_and_for_nothing_else(widget):
    """A button replaced between press and release loses its click; a context menu takes the release."""
    widget.evaluate("window.first = frame()")
    widget.evaluate(PRESS, 0)
    widget.evaluate("() => { window.taken = change(); }")
    assert widget.evaluate("first === frame()")
    assert listeners(widget, "window", "pointercancel") == ["pointercancel"]
    widget.evaluate("dispatchEvent(new PointerEvent('pointerup'))")
    widget.wait_for_function("first !== frame()", timeout=5_000)
    assert listeners(widget, "window", "pointercancel") == []
    widget.evaluate("window.first = frame()")
    widget.evaluate(PRESS, 2)
    widget.evaluate("() => { window.taken = change(); }")
    widget.wait_for_function("first !== frame()", timeout=5_000)


def test_a_sample_without_recorded_tokens_shows_its_prompt(seen, tmp_path):
    log = log_of(3)
    seen.page.goto(view.samples(log, emptied_trace()).save(tmp_path / "samples.html").as_uri())
    panel = seen.page.locator(".mixlens .detail")
    for number, text in enumerate(["gamma" * 3, None, "alpha" * 3]):
        seen.page.locator(".mixlens table.list tbody tr").nth(number).click()
        shown = panel.locator(".text")
        assert (shown.text_content() if shown.count() else None) == text
        assert (panel.locator("pre").text_content() == "Which?") if text is None else panel.locator("pre").count() == 0
    assert seen.errors == []


def test_a_sequence_without_tokens_is_said_in_a_diff(seen, tmp_path):
    part = emptied_trace()
    seen.page.goto(view.diff(part, part, [0, 1, 2]).save(tmp_path / "diff.html").as_uri())
    readout = seen.page.locator(".mixlens .readout").first
    for number, text in enumerate(["alpha", "This sequence has no tokens.", "gamma"]):
        seen.page.locator(".mixlens select").first.select_option(str(number))
        assert text in readout.text_content()
    assert seen.errors == []
