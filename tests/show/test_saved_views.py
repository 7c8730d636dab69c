"""Views of runs, and the widget form, in a notebook that JupyterLab saved and opened again without a kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab import CONTRAST, LIVE, SETUP, open_notebook, ours, run_all, save, shut_down_kernels

pytestmark = pytest.mark.browser
BENCH = str(Path(__file__).parent.parent / "bench")
RUNS = f"""sys.path.insert(0, {BENCH!r})
import numpy as np
import pandas as pd
from bench_samples import bench
from mixlens.evals.runner import EvalSettings
from mixlens.stats.pareto import COLUMNS, Pareto
loads = bench({{"concurrency 1": [1, 1.1, 1.3], "concurrency 4": [2, 2.5, 4, 6]}})
rows = [("bf16", "bytes", 93e9), ("nf4", "bytes", 26e9), ("nf4", "kl", 0.1), ("int8", "bytes", 47e9)]
table = pd.DataFrame([(*row, np.nan, np.nan, "", 10) for row in rows], columns=COLUMNS)
schemes = Pareto(table, {{"documents": 3}})
settings = EvalSettings(routing=True, progress=False)
log = ml.evaluate(ml.load("demo", verbose=False), "demo_0shot", limit=2, settings=settings)"""
VIEWS = [
    "ml.view.latency(loads)",
    "ml.view.pareto(schemes)",
    "ml.view.samples(log)",
    "ml.view.samples(log, log.routing.select(positions=(3, 1000)))",  # as if three tokens were shared
]
TOLD = """import json
first, rows = log.samples.iloc[0], log.routing.sequences
mine = rows["counted"] & (rows["document_id"] == f"{first['task']}/{first['sample_id']}")
ids = log.routing.select(where=mine).read("expert_id")[:, 3]
found = {name: len(log.samples.query(f"correct == {value}")) for name, value in (("correct", 1), ("wrong", 0))}
print(json.dumps({"ids": ids.tolist(), "task": first["task"], "prompt": first["prompt"], "found": found}))"""


@pytest.fixture(scope="module")
def told(lab, chromium):
    """What the kernel of runs.ipynb said of the first sample's routing before it ended; the notebook stays."""
    book = lab.write("runs.ipynb", SETUP, RUNS, *VIEWS, TOLD)
    page = chromium.new_page()
    open_notebook(lab, page, book.name)
    run_all(page)
    page.wait_for_function(f"document.querySelectorAll(`{LIVE}`).length === {len(VIEWS)}")
    save(page)
    shut_down_kernels(page)
    page.close()
    cells = json.loads(book.read_text("utf-8"))["cells"]
    return json.loads("".join(cells[-1]["outputs"][0]["text"]))


@pytest.fixture
def reopened(lab, told, seen):
    """The views of runs.ipynb, opened without a kernel; the console is clean when the test is done."""
    open_notebook(lab, seen.page, "runs.ipynb", kernel=False)
    seen.page.wait_for_function(f"document.querySelectorAll(`{LIVE}`).length === {len(VIEWS)}")
    yield [seen.page.locator(".mixlens").nth(i) for i in range(len(VIEWS))]
    assert (ours(seen.log), seen.errors, seen.requests) == ([], [], [])


def test_latency_curves_are_read_by_keys(reopened):
    latency = reopened[0]
    assert latency.locator("path.curve").count() == 2
    assert "concurrency 1" in latency.locator(".readout").text_content()
    latency.locator("svg").press("ArrowDown")
    assert "concurrency 4" in latency.locator(".readout").text_content()
    for _ in range(10):
        latency.locator("svg").press("ArrowRight")
    assert "100 % of 4 requests within 2.40 s" in latency.locator(".readout").text_content()  # six times 400 ms


def test_pareto_points_are_read_by_keys(reopened):
    pareto = reopened[1]
    assert pareto.locator("circle.dot.best").count() == 1  # the one with both measured
    assert "weights, MB93,000" in pareto.locator(".readout").text_content()
    assert "not measured" in pareto.locator(".readout").text_content()
    pareto.locator("svg").press("ArrowRight")
    assert "nf4" in pareto.locator(".readout").text_content()
    assert "0.1" in pareto.locator(".readout").text_content()


def test_a_sample_shows_the_routing_that_was_recorded_while_it_was_answered(reopened, told):
    samples = reopened[2]
    samples.locator("input[type=range]").focus()
    samples.locator("input[type=range]").press("Home")
    for _ in range(3):
        samples.locator("input[type=range]").press("ArrowRight")
    samples.locator(".text").wait_for()
    assert told["task"] in samples.locator(".detail h4").text_content()
    looks = samples.locator(".text span.t").evaluate_all("spans => spans.map(s => s.className)")
    assert looks == [f"t e{first} s{second}" for first, second in told["ids"]]
    shown = samples.locator(".text").text_content()
    assert told["prompt"] in shown
    samples.locator(".text").press("End")
    assert f"position{len(looks) - 1}" in samples.locator(".detail .readout").text_content()
    samples.locator("table.list").press("ArrowDown")
    assert samples.locator(".list tr[data-cursor]").count() == 1
    assert samples.locator(".text span.t").count() > 5


def test_samples_are_filtered_and_searched(reopened, told):
    samples = reopened[2]
    count = samples.locator(".stepper output")
    for outcome, n in told["found"].items():
        samples.get_by_label("outcome").select_option(label=outcome)
        assert count.text_content().endswith(f" of {n}")
        assert samples.locator(f".list tbody tr:not(.{outcome})").count() == 0
    samples.get_by_label("outcome").select_option(label="all")
    samples.get_by_label("search prompts and answers").fill(told["prompt"])
    assert count.text_content() == "1 to 1 of 1"
    samples.get_by_label("search prompts and answers").fill("no such words")
    assert "No sample fits." in samples.locator(".detail").text_content()


def test_what_samples_share_is_said(reopened, told):
    assert "Before it: 3 tokens" in reopened[3].locator(".detail").text_content()
    assert reopened[3].locator(".text span.t").count() == len(told["ids"]) - 3


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_their_text_has_contrast(reopened, seen, theme):
    seen.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
    seen.page.wait_for_selector(f".mixlens .frame[data-theme={'dark' if 'Dark' in theme else 'light'}]")
    for made in reopened:
        found = made.locator(".frame").evaluate(CONTRAST)
        assert found[0][0] >= 4.5, found[:4]


def test_of_a_widget_whose_kernel_is_gone_a_picture_stays(lab, seen):
    book = lab.write("widget.ipynb", SETUP, "ml.view.tokens(trace, 5).widget()")
    page = seen.page
    open_notebook(lab, page, book.name)
    run_all(page)
    page.wait_for_selector(LIVE)
    save(page)
    shut_down_kernels(page)
    outputs = json.loads(book.read_text("utf-8"))["cells"][1]["outputs"]
    assert [sorted(output["data"]) for output in outputs] == [
        ["application/vnd.jupyter.widget-view+json", "text/plain"],
        ["text/html", "text/plain"],
    ]
    open_notebook(lab, page, book.name, kernel=False)
    page.locator(".jp-OutputArea-output summary", has_text="Without a kernel: Routing of sequence 5").click()
    picture = page.locator(".jp-OutputArea-output details img")
    assert picture.evaluate("i => i.complete && i.naturalWidth") > 300
    assert picture.get_attribute("alt").startswith("Text of sequence 5")
    assert seen.errors == []
