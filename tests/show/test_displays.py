"""What a notebook shows of runs: words first, then one live view; one output, and nothing from a model as markup."""

from __future__ import annotations

import re
import sys
from html import escape

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from show_samples import HOSTILE, N_EXPERTS
from test_views import log_of
from unpacking import unpack

import mixlens as ml
from mixlens import notebook
from mixlens.bench.bench import Bench
from mixlens.bench.events import Record
from mixlens.comparison import Comparison
from mixlens.evals.log import Log
from mixlens.trace.trace import Trace


def one_live_view(shown: str) -> bool:
    return shown.count("<script>") == shown.count("</script>") == 1 and '<img alt="' in shown.split("<script>")[0]


@pytest.fixture
def in_notebook(monkeypatch):
    """What a notebook shows of an object: a function from the object to its HTML."""
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    notebook.register()
    shell.display_formatter.formatters["text/html"].enabled = True
    return lambda shown: shell.display_formatter.format(shown)[0]["text/html"]


def live_data(shown: str) -> dict:
    return unpack(max(re.findall(r'm\.mount\(host,"\w+","([^"]+)"', shown)))[0]


def test_a_trace_shows_its_words_and_its_first_sequences(trace, in_notebook):
    shown = in_notebook(trace)
    assert one_live_view(shown)
    assert "1,440 tokens in 24 documents" in shown
    assert "Shown: 4 of 24 sequences" in shown
    assert HOSTILE[0].strip("▁") not in shown


def test_a_trace_without_tokens_has_words_alone(trace, in_notebook):
    empty = trace.select(positions=(1000, 1001))
    assert "<script>" not in in_notebook(empty)
    assert "0 tokens" in in_notebook(empty)


def test_a_long_trace_is_cut_and_says_so(in_notebook):
    long = Trace.from_arrays(np.tile([[[0, 1]]], (5000, 1, 1)), n_experts=4)
    assert "their first 2,000 tokens" in in_notebook(long)


@pytest.mark.parametrize(
    ("lengths", "shown"), [((1500, 500, 9), 2), ((1500, 501, 9), 1), ((9, 9, 9, 9, 9), 4), ((5000, 9), 1)]
)
def test_as_many_sequences_are_shown_as_have_2000_tokens_and_four_at_most(lengths, shown, in_notebook):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    trace = Trace.from_arrays(np.tile([[[0, 1]]], (len(sequence), 1, 1)), n_experts=4, tokens={"sequence": sequence})
    made = in_notebook(trace)
    assert f"{shown} of {len(lengths)}" in made
    assert len(live_data(made)["starts"]) == shown + 1


def test_without_a_notebook_the_classes_show_their_summary_alone(trace):
    assert trace._repr_html_() == f"<p>{escape(repr(trace))}</p>"
    assert "<script>" not in log_of(3)._repr_html_()


def test_marimo_asks_the_class_itself(trace, monkeypatch):
    monkeypatch.setitem(sys.modules, "marimo", object())
    for shown in (Trace, Bench, Comparison, Log):
        monkeypatch.setattr(shown, "_mime_", None, raising=False)
    notebook.register()
    kind, shown = trace._mime_()
    assert kind == "text/html"
    assert one_live_view(shown)
    assert one_live_view(log_of(3)._mime_()[1])


def test_a_long_comparison_is_cut_and_says_so(in_notebook):
    long = Trace.from_arrays(np.tile([[[0, 1]]], (10_001, 1, 1)), n_experts=4)
    made = Comparison(long, long, names=("a", "b"), bootstrap=ml.stats.Bootstrap(replicates=20))
    assert "the first 10,000 of 10,001 tokens of the first sequence" in in_notebook(made)


def test_an_evaluation_shows_scores_and_samples(in_notebook):
    shown = in_notebook(log_of(3, HOSTILE[0]))
    assert one_live_view(shown)
    assert HOSTILE[0].strip("▁") not in shown


@pytest.mark.parametrize(("each", "shown"), [(3000, 3), (2000, 5), (20_000, 1), (1, 12)])
def test_an_evaluation_shows_samples_of_ten_thousand_routed_tokens_and_says_so(each, shown, in_notebook):
    log, n = log_of(12), 12 * each
    frame = pd.DataFrame({"task": "quiz", "sample_id": range(11, -1, -1), "counted": True})
    sequence = np.repeat(np.arange(12), each)
    log.routing = Trace.from_arrays(
        np.zeros((n, 1, 1), int), n_experts=4, tokens={"sequence": sequence}, sequences=frame
    )
    html = in_notebook(log)
    assert ("; the first" in html) == (shown < 12)
    assert shown == 12 or f"n = 12 samples of 1 task, 4 not scored; the first {shown} are shown." in html
    assert len(set(live_data(html)["sample_sequence"])) == shown


def test_a_benchmark_without_a_success_has_no_curves(in_notebook):
    failed = Record(0, "concurrency 1", "measured", "timeout", (), 0.0, 9.0)
    about = {"endpoint": {"model": "m", "url": "http://127.0.0.1:1"}, "created": "today"}
    assert "<script>" not in in_notebook(Bench([failed], about))


def test_a_comparison_shows_both_texts(trace, in_notebook):
    ids = trace.read("expert_id").copy()
    ids[::7, 1] = ids[::7, 1, ::-1]
    tokens = {name: trace.read(name) for name in ("sequence", "token_id")}
    other = Trace.from_arrays(ids, n_experts=N_EXPERTS, tokens=tokens, sequences=trace.sequences[["document_id"]])
    other._vocabulary = trace.vocabulary
    made = Comparison(trace, other, names=("a/b", "a/b"), bootstrap=ml.stats.Bootstrap(replicates=20))
    shown = in_notebook(made)
    assert one_live_view(shown)
    assert re.search("a.b", shown)
