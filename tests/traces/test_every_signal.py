"""Every signal of every way to record, against the rows run alone through bare hooks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.bare import EXPERTS, STREAM
from helpers.told import NEXT, TOKENS, assert_sequences, assert_signal
from helpers.ways import DOCUMENTS, PLANS, WAYS, documents, truth_of, way_of

SIGNALS = ("sequence", *TOKENS, "expert_id", "weight", "router_logits", *NEXT, *STREAM, *EXPERTS)
ROUTING_ALONE = ("sequence", "position", "token_id", "phase", "expert_id", "weight", "router_logits")


@pytest.mark.parametrize(
    ("way", "signal"),
    [(way, signal) for way in WAYS for signal in (ROUTING_ALONE if way == "compiled" else SIGNALS)],
)
def test_a_signal_is_that_of_rows_run_alone(way, signal):
    trace = way_of(way).traces["all"]
    assert trace.n_tokens == sum(map(len, way_of(way).rows))
    assert_signal(trace, truth_of(way), signal)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
@pytest.mark.parametrize("tokens", ["prompt", "generated", "last"])
def test_a_site_keeps_the_tokens_that_were_asked_for(way, tokens):
    truth, trace = truth_of(way, tokens), way_of(way).traces[tokens]
    assert trace.sites == {"attn_out": (0, 1, 2), "expert_norm": (1, 2)}
    for site in truth.kept:
        assert_signal(trace, truth, site)


@pytest.mark.parametrize("way", WAYS)
def test_lengths_names_and_the_callers_columns(way):
    rows = way_of(way).rows
    for plan, trace in way_of(way).traces.items():
        assert trace.sequences["length"].tolist() == [len(row) for row in rows]
        assert trace.sequences.index.tolist() == list(range(len(rows)))
        assert (trace.n_experts, trace.top_k, trace.layers.tolist()) == (5, 2, [0, 1, 2])
        assert_sequences(trace, truth_of(way))
        np.testing.assert_array_equal(trace.read("sequence"), truth_of(way).columns["sequence"])
        if way != "compiled":
            options = set(PLANS[plan]) & {"router_logits", "logprob", "top_logprobs"}
            named = options - {"top_logprobs"} | (set(NEXT) if "top_logprobs" in options else set())
            assert set(trace.signals) == named | {"sequence", "position", "token_id", "phase", "expert_id", "weight"}


@pytest.mark.parametrize("way", ["record to disk", "resumed"])
def test_a_run_says_what_it_holds(way):
    for plan, trace in way_of(way).traces.items():
        meta = json.loads((trace.path / "meta.json").read_text())
        tokens = [sum(map(len, rows)) for rows in (DOCUMENTS[:3], DOCUMENTS[3:6], DOCUMENTS[6:])]
        assert meta["counts"] == {"tokens": sum(tokens), "sequences": 7, "documents": 7}
        assert meta["shard_counts"] == [
            {"tokens": n, "first_sequence": first, "last_sequence": last}
            for n, first, last in zip(tokens, (0, 3, 6), (2, 5, 6), strict=True)
        ]
        assert meta["reading"].items() >= {
            "truncated_documents": 0, "truncated_tokens": 0, "split_documents": 0
        }.items()  # fmt: skip
        assert meta["layers"] == [0, 1, 2]
        assert set(meta["signals"]) == set(trace.signals)
        sites = [signal for signal in PLANS[plan] if not isinstance(signal, str)]
        assert meta["sites"] == {site.name: list(site.layers or (0, 1, 2)) for site in sites}
        assert (meta["kind"], meta["source"], meta["n_experts"], meta["top_k"]) == ("trace", "record", 5, 2)
        assert len(documents()) == meta["settings"]["documents"]
        assert (meta["settings"]["batch_tokens"], meta["settings"]["shard_tokens"]) == (16, 15)
        assert (meta["settings"]["max_length"], meta["settings"]["overlong"]) == (30, "error")


def test_a_resumed_run_has_the_bytes_of_one_in_one_go():
    for plan in PLANS:
        whole, resumed = (way_of(way).traces[plan].path for way in ("record to disk", "resumed"))
        names = {path.name for path in whole.iterdir()}
        assert names == {path.name for path in resumed.iterdir()}
        for name in names - {"meta.json"}:
            assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
