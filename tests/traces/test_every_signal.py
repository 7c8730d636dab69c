"""Every signal of every way to record, against the rows run alone through bare hooks."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.bare import EXPERTS, STREAM
from helpers.told import NEXT, TOKENS, assert_sequences, assert_signal, told
from helpers.ways import PLANS, WAYS, net, way_of

import mixlens as ml

SIGNALS = ("sequence", *TOKENS, "expert_id", "weight", "router_logits", *NEXT, *STREAM, *EXPERTS)


def truth_of(way, plan):
    sites = [signal for signal in PLANS[plan] if isinstance(signal, ml.Site)]
    return told(net(), way.rows, way.prompts, sites=sites, table=way.table, scores_prompts=way.scores_prompts)


@pytest.fixture(scope="module", params=list(WAYS))
def way(request):
    return way_of(request.param)


@pytest.fixture(scope="module")
def truth(way):
    return truth_of(way, "all")


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_signal_is_that_of_rows_run_alone(way, truth, signal):
    trace = way.traces["all"]
    if signal not in (*trace.signals, *trace.sites):
        assert isinstance(trace.meta["source"], str)
        assert len(way.traces) == 1, "only a CompiledRecorder keeps routing alone"
        return
    assert trace.n_tokens == sum(map(len, way.rows))
    assert_signal(trace, truth, signal)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "all"])
def test_a_site_keeps_the_tokens_that_were_asked_for(way, plan):
    if plan not in way.traces:
        return
    expected = truth_of(way, plan)
    for site in expected.kept:
        assert_signal(way.traces[plan], expected, site)


def test_lengths_and_the_callers_columns(way, truth):
    for trace in way.traces.values():
        assert trace.sequences["length"].tolist() == [len(row) for row in way.rows]
        assert trace.sequences.index.tolist() == list(range(len(way.rows)))
        assert_sequences(trace, truth)
        np.testing.assert_array_equal(trace.read("sequence"), truth.columns["sequence"])
