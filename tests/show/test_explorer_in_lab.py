"""The explorer in a real JupyterLab with a kernel: typing, streaming, stopping, choosing, recording, evaluating."""

from __future__ import annotations

import pytest
from lab import open_notebook, run_all

pytestmark = pytest.mark.browser
CELL = "import mixlens as ml\nexplorer = ml.Explorer(ml.load('demo', verbose=False), ml.demo_documents())\nexplorer"
NUMBERS = ".jp-OutputArea-output input[type=number]"
VIEWS = ".mixlens[data-ready='1']"


def enter(page, box, value: str) -> None:
    box.fill(value)
    box.press("Tab")


@pytest.fixture
def page(lab, seen):
    book = lab.write("explorer.ipynb", CELL)
    open_notebook(lab, seen.page, book.name)
    run_all(seen.page)
    seen.page.get_by_role("button", name="generate").wait_for()
    yield seen.page
    assert seen.errors == []
    assert seen.requests == []


def test_routing_streams_is_followed_and_stops(page):
    page.locator(".jp-OutputArea-output textarea").fill("The theorem <b>follows</b>")
    page.get_by_role("button", name="generate").click()
    page.wait_for_selector(f"{VIEWS} .text span.t")
    page.locator(".mixlens button.expert").nth(2).click()
    page.get_by_text("recorded tokens after").wait_for(timeout=120_000)
    assert page.locator(".mixlens [aria-pressed=true]").text_content() == "2"  # kept while tokens came in
    assert "<b>follows</b>" in page.locator(".mixlens .text").text_content()
    assert page.locator(".mixlens .text span.generated").count() > 3
    page.locator(".jp-OutputArea-output textarea").fill("a line\n" * 12)
    enter(page, page.locator(NUMBERS).first, "3000")
    page.get_by_role("button", name="generate").click()
    page.wait_for_function(
        """() => { const text = document.querySelector(".mixlens").shadowRoot.querySelector(".text");
            return text && text.scrollTop > 40 && text.scrollTop + text.clientHeight > text.scrollHeight - 40; }""",
        timeout=120_000,
    )
    page.locator(".jp-OutputArea-output button:not([disabled])", has_text="stop").click()
    page.get_by_text("Stopped after").wait_for(timeout=60_000)


def test_what_is_recorded_and_evaluated_is_shown_and_moves_together(page):
    enter(page, page.locator(NUMBERS).nth(1), "12")
    page.get_by_role("button", name="record").click()
    page.get_by_text("Recorded 12 of 12 documents").wait_for(timeout=120_000)
    page.wait_for_function(f"document.querySelectorAll(`{VIEWS}`).length === 2")
    maps, dots = page.locator(".mixlens").nth(0), page.locator(".mixlens").nth(1)
    maps.locator(".grids").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert dots.locator(".slider output").text_content() == "2"
    assert "expert1" in dots.locator(".readout").text_content()
    page.locator(".widget-dropdown select").select_option("github")
    page.wait_for_function(
        """() => { const [, dots] = document.querySelectorAll(".mixlens");
            return dots.shadowRoot.querySelector("select").selectedOptions[0].textContent === "github"; }"""
    )
    assert "github" in maps.locator(".readout").text_content()
    assert page.locator(".jp-OutputArea-output textarea").input_value().startswith('"""Reading and writing')
    enter(page, page.locator(".jp-OutputArea-output input[type=text]"), "demo_0shot::agreement")
    enter(page, page.locator(NUMBERS).last, "5")
    page.get_by_role("button", name="evaluate").click()
    page.get_by_text("Evaluated 5 samples.").wait_for(timeout=240_000)
    assert page.locator(".progress-bar").evaluate("bar => bar.style.width") == "100%"
    page.wait_for_function(f"document.querySelectorAll(`{VIEWS}`).length === 3")
    samples = page.locator(".mixlens").nth(2)
    assert samples.locator(".list tbody tr").count() == 5
    assert page.locator(".mixlens-scores td", has_text="demo_0shot::agreement").count() == 1
