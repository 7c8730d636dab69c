"""Views in a real JupyterLab: live, saved, reopened without a kernel, untrusted, exported, dark, by keyboard alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lab import CONTRAST, LIVE, SETUP, Lab, open_notebook, ours, run, run_all, save, shut_down_kernels
from show_samples import HOSTILE

pytestmark = pytest.mark.browser
VIEW = "ml.view.tokens(trace, [0, 3], layer=0)"
SLIDER = ".jp-OutputArea-output .mixlens input[type=range]"


@pytest.fixture(scope="module")
def saved(lab, chromium):
    """A notebook that was run and saved by JupyterLab itself; its kernel is gone."""
    book = lab.write("saved.ipynb", SETUP, VIEW)
    page = chromium.new_page()
    open_notebook(lab, page, book.name)
    run_all(page)
    page.wait_for_selector(LIVE)
    save(page)
    shut_down_kernels(page)
    page.close()
    return book


def output_html(book: Path) -> str:
    cells = json.loads(book.read_text("utf-8"))["cells"]
    return "".join(cells[1]["outputs"][0]["data"]["text/html"])


def test_live_with_a_clean_console_and_no_request_and_three_keys_move_three_layers(lab, seen):
    book = lab.write("live.ipynb", SETUP, VIEW)
    open_notebook(lab, seen.page, book.name)
    run_all(seen.page)
    seen.page.wait_for_selector(LIVE)
    slider = seen.page.locator(SLIDER)
    slider.focus()
    for _ in range(3):
        seen.page.keyboard.press("ArrowRight")
    assert slider.input_value() == "3"
    assert seen.page.locator(".mixlens .slider output").text_content() == "3"
    assert (ours(seen.log), seen.errors, seen.requests) == ([], [], [])


def test_answers_while_a_cell_is_busy(lab, seen):
    book = lab.write("busy.ipynb", SETUP, VIEW, "import time\nprint('begun', flush=True)\ntime.sleep(60)")
    page = seen.page
    open_notebook(lab, page, book.name)
    run(page)
    page.wait_for_selector(LIVE, timeout=120_000)
    page.get_by_text("begun", exact=True).wait_for()
    page.locator(SLIDER).press("ArrowRight")
    assert page.locator(".mixlens .slider output").text_content() == "1"
    page.locator(".mixlens .text span.t").nth(12).hover()
    assert "position12" in page.locator(".mixlens .readout").text_content()
    assert page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status") == "busy"
    shut_down_kernels(page)


def test_reopened_without_a_kernel_and_saved_again_it_is_live(lab, saved, seen):
    for _ in range(2):
        open_notebook(lab, seen.page, saved.name, kernel=False)
        seen.page.wait_for_selector(LIVE)
        seen.page.locator(SLIDER).press("ArrowRight")
        assert seen.page.locator(".mixlens .slider output").text_content() == "1"
        save(seen.page)
        shut_down_kernels(seen.page)
    assert (ours(seen.log), seen.errors, seen.requests) == ([], [], [])


def test_untrusted_the_picture_its_alt_text_and_caption_stand(saved, chromium, seen, tmp_path):
    stranger = Lab(saved.parent, tmp_path)
    try:
        stranger.wait(seen.page)
        open_notebook(stranger, seen.page, saved.name, kernel=False)
        picture = seen.page.locator(".jp-OutputArea-output img")
        picture.wait_for()
        assert picture.get_attribute("alt").startswith("Text of sequence 0, arxiv")
        assert picture.evaluate("i => i.complete && i.naturalWidth") > 300
        assert "Text of sequence 0" in seen.page.locator(".jp-OutputArea-output figcaption").text_content()
        assert seen.page.locator(".jp-OutputArea-output table tr").count() == 9
        assert seen.page.locator(LIVE).count() == 0
        assert seen.page.locator(".jp-OutputArea-output script").count() == 0
        shut_down_kernels(seen.page)
    finally:
        stranger.stop()


def test_exported_by_nbconvert_it_is_live_offline(saved, chromium, seen, tmp_path):
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--output-dir", str(tmp_path), str(saved)]
    subprocess.run(command, check=True, capture_output=True)
    seen.page.goto((tmp_path / "saved.html").as_uri())
    seen.page.wait_for_selector(".mixlens[data-ready='1']", state="attached")
    seen.page.locator(".mixlens input[type=range]").press("ArrowRight")
    assert seen.page.locator(".mixlens .slider output").text_content() == "1"
    assert seen.errors == []


def test_running_a_cell_three_times_does_not_grow_the_file(lab, saved, seen):
    once = saved.stat().st_size
    book = lab.write("thrice.ipynb", SETUP, VIEW)
    open_notebook(lab, seen.page, book.name)
    for _ in range(3):
        run_all(seen.page)
        seen.page.wait_for_selector(LIVE)
    save(seen.page)
    assert abs(book.stat().st_size - once) < 2_000
    assert output_html(book) == output_html(saved)


def test_hostile_text_shows_as_text(lab, saved, seen):
    open_notebook(lab, seen.page, saved.name, kernel=False)
    seen.page.wait_for_selector(LIVE)
    shown = seen.page.locator(".mixlens .text").text_content()
    for piece in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], HOSTILE[4], HOSTILE[8]):
        assert piece.replace("▁", " ") in shown
    assert "⟨E2⟩" in shown
    assert "(10,000 characters)" in shown
    assert seen.page.locator(".mixlens .text script, .mixlens .text img").count() == 0
    assert seen.errors == []


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_text_has_contrast_in_the_notebooks_theme(lab, saved, seen, theme):
    page = seen.page
    open_notebook(lab, page, saved.name, kernel=False)
    page.wait_for_selector(LIVE)
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
    page.wait_for_selector(f".mixlens .frame[data-theme={'dark' if 'Dark' in theme else 'light'}]")
    page.locator(".mixlens button.expert").nth(3).click()
    for mode in range(page.locator(".mixlens select").nth(1).locator("option").count()):
        page.locator(".mixlens select").nth(1).select_option(index=mode)
        found = page.locator(".mixlens .frame").evaluate(CONTRAST)
        assert len(found) > 60
        assert found[0][0] >= 4.5, found[:5]


def test_the_keyboard_alone_suffices_and_commands_of_the_notebook_stay_away(lab, saved, seen):
    page = seen.page
    open_notebook(lab, page, saved.name, kernel=False)
    page.wait_for_selector(LIVE)
    cells = page.locator(".jp-Cell").count()
    reached = []
    page.locator(".mixlens select").first.focus()
    for _ in range(24):
        name = page.evaluate(
            """() => { const at = document.activeElement?.shadowRoot?.activeElement;
                return at && (at.getAttribute("aria-label") || at.title || at.type || at.className); }"""
        )
        reached.append(name or "")
        if name and name.startswith("search"):
            page.keyboard.type("abdd router")
            page.keyboard.press("Enter")
        if name == "only expert 2":
            page.keyboard.press("Space")
        if name and name.startswith("Tokens."):
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowDown")
            break
        page.keyboard.press("Tab")
    for wanted in ("sequence", "layer", "checkbox", "only expert 7", "next token where", "search", "colour", "Tokens."):
        assert any(wanted in name for name in reached), (wanted, reached)
    assert page.locator(".mixlens [aria-pressed=true]").text_content() == "2"
    assert "position1" in page.locator(".mixlens .readout").text_content()
    assert page.locator(".mixlens .slider output").text_content() == "1"
    assert page.locator(".jp-Cell").count() == cells
    assert re.match("0 tokens", page.locator(".mixlens .search output").text_content())


def test_a_layer_or_expert_chosen_in_one_output_moves_the_others(lab, seen):
    book = lab.write("linked.ipynb", SETUP, VIEW, "ml.view.tokens(trace, 5)")
    page = seen.page
    open_notebook(lab, page, book.name)
    run_all(page)
    page.wait_for_function(f"document.querySelectorAll(`{LIVE}`).length === 2")
    first, second = page.locator(".mixlens").nth(0), page.locator(".mixlens").nth(1)
    first.locator("input[type=range]").press("End")
    assert second.locator(".slider output").text_content() == "3"
    second.locator("button.expert").nth(6).click()
    assert first.locator("[aria-pressed=true]").text_content() == "6"
    second.locator("button.expert").nth(6).click()
    assert first.locator("[aria-pressed=true]").count() == 0


ALL = """few = ml.stats.Bootstrap(replicates=50)
share = ml.stats.expert_share(trace, by="domain", bootstrap=few)
together = ml.stats.coactivation(trace, bootstrap=few)
moves = [ml.stats.transitions(trace, gap=gap, bootstrap=few) for gap in (1, 2)]"""
VIEWS = [
    "ml.view.tokens(trace, [0, 2, 4, 6], layer=0)",
    "ml.view.share_heatmap(share)",
    "ml.view.expert_share(share)",
    "ml.view.coactivation(together)",
    "ml.view.transitions(moves)",
    "ml.view.strip(trace, 0)",
    "ml.view.diff(trace, trace, [0, 2], names=('a', 'b'))",
]


def test_all_views_are_linked_keyboard_driven_and_readable_in_the_dark(lab, seen):
    book = lab.write("all.ipynb", SETUP, ALL, *VIEWS)
    page = seen.page
    open_notebook(lab, page, book.name)
    run_all(page)
    page.wait_for_function(f"document.querySelectorAll(`{LIVE}`).length === {len(VIEWS)}")
    text, shares, dots, pairs, moves, strip, diff = (page.locator(".mixlens").nth(i) for i in range(len(VIEWS)))
    shares.locator(".grids").focus()
    for key in ("PageDown", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)  # domain github, layer 2, expert 3
    assert "github" in shares.locator(".readout").text_content()
    assert "github" in text.locator("select").first.evaluate("s => s.selectedOptions[0].textContent")
    assert text.locator(".slider output").text_content() == "2"
    assert text.locator("[aria-pressed=true]").text_content() == "3"
    assert dots.locator("select").evaluate("s => s.selectedOptions[0].textContent") == "github"
    assert dots.locator(".slider output").text_content() == "2"
    assert "expert3" in dots.locator(".readout").text_content()
    assert pairs.locator(".slider output").text_content() == "2"
    assert "i3" in pairs.locator(".readout").text_content()
    assert "layer2" in strip.locator(".readout").text_content()
    assert strip.locator("[aria-pressed=true]").text_content() == "3"
    assert diff.locator(".slider output").text_content() == "2"
    assert "from3" in moves.locator(".readout").text_content()
    gap = moves.locator("input[aria-label=gap]")
    gap.press("ArrowRight")
    assert "gap2" in moves.locator(".readout").text_content()
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    page.wait_for_selector(".mixlens .frame[data-theme=dark]")
    for made in (text, shares, dots, pairs, moves, strip, diff):
        found = made.locator(".frame").evaluate(CONTRAST)
        assert found[0][0] >= 4.5, found[:4]
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Light' })")
    assert (ours(seen.log), seen.errors, seen.requests) == ([], [], [])


def test_a_widget_tells_python_what_is_chosen_and_is_told(lab, seen):
    book = lab.write(
        "widget.ipynb",
        SETUP,
        "import ipywidgets\nw = ml.view.tokens(trace, 0, layer=0).widget()\nsaid = ipywidgets.Label('nothing yet')\n"
        "w.observe(lambda c: setattr(said, 'value', f'layer is {c.new.get(\"layer\")}'), 'selection')\n"
        "ask = ipywidgets.Button(description='ask for 3')\n"
        "ask.on_click(lambda _: setattr(w, 'asked', {'layer': 3}))",
        "w",
        "ipywidgets.VBox([said, ask])",
    )
    page = seen.page
    open_notebook(lab, page, book.name)
    run_all(page)
    page.wait_for_selector(".mixlens[data-ready='1']")
    page.locator(".widget-label", has_text="nothing yet").wait_for()
    page.locator(".mixlens input[type=range]").press("ArrowRight")
    page.locator(".widget-label", has_text="layer is 1").wait_for()
    page.get_by_role("button", name="ask for 3").click()
    page.wait_for_function(
        "document.querySelector('.mixlens').shadowRoot.querySelector('.slider output').textContent === '3'"
    )
    assert seen.errors == []
