"""Nested-loop oracles for expert share, load balance, entropy, confidence and position profile."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens.errors import BadInput, MissingSignal
from mixlens.stats import Bootstrap, expert_share, load_balance, position_profile, router_confidence, routing_entropy
from mixlens.trace.trace import Trace

QUICK = Bootstrap(replicates=20)


def softmax(logits: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


@pytest.mark.parametrize("slot", ["any", "first"])
def test_expert_share_by_hand(make_trace, tokens_of, in_small_blocks, slot):
    trace = in_small_blocks(make_trace())
    found = expert_share(trace, by="domain", slot=slot, bootstrap=QUICK)
    assert found["estimate"].dims == ("domain", "layer", "expert")
    for domain in "xy":
        tokens = [t for t in tokens_of(trace) if t.row.domain == domain]
        assert found["n"].sel(domain=domain) == len(tokens)
        for layer in range(trace.n_layers):
            for expert in range(trace.n_experts):
                slots = [t.expert_id[layer] if slot == "any" else t.expert_id[layer][:1] for t in tokens]
                expected = sum(expert in s for s in slots) / sum(len(s) for s in slots)
                assert found["estimate"].sel(domain=domain, layer=layer, expert=expert) == pytest.approx(expected)
    np.testing.assert_allclose(found["estimate"].sum("expert"), 1)


def test_expert_share_of_two_columns_leaves_missing_combinations_open(make_trace, tokens_of):
    trace = make_trace()
    trace = trace.select(where=~((trace.sequences.domain == "x") & (trace.sequences.source == "b")))
    found = expert_share(trace, by=["domain", "source"], bootstrap=QUICK)
    assert found["estimate"].dims == ("domain", "source", "layer", "expert")
    assert list(found["domain"].values) == ["x", "y"]
    nobody = found.sel(domain="x", source="b")
    assert np.isnan(nobody["estimate"]).all()
    assert nobody["n"] == 0
    assert nobody["n_documents"] == 0
    tokens = [t for t in tokens_of(trace) if t.row.domain == "y" and t.row.source == "b"]
    expected = sum(3 in t.expert_id[1] for t in tokens) / (2 * len(tokens))
    assert found["estimate"].sel(domain="y", source="b", layer=1, expert=3) == pytest.approx(expected)


def test_unknown_slot_is_refused(make_trace):
    with refused(BadInput, "slot", "second"):
        expert_share(make_trace(), slot="second")


def test_load_balance_by_hand(make_trace, tokens_of, in_small_blocks):
    trace = in_small_blocks(make_trace())
    found = load_balance(trace, bootstrap=QUICK)["estimate"]
    tokens = tokens_of(trace)
    for layer in range(trace.n_layers):
        chosen = [sum(e in t.expert_id[layer] for t in tokens) for e in range(8)]
        probability = [0.0] * 8
        for t in tokens:
            for e, p in enumerate(softmax(t.router_logits[layer])):
                probability[e] += p / len(tokens)
        mean = sum(chosen) / 8
        cv = math.sqrt(sum((c - mean) ** 2 for c in chosen) / 8) / mean
        switch = 8 * sum(c / len(tokens) * p for c, p in zip(chosen, probability, strict=True))
        expected = [cv, max(chosen) / mean, switch]
        np.testing.assert_allclose(found.sel(layer=layer), expected, rtol=1e-6)


def routed(ids: np.ndarray, logits: np.ndarray | None = None, n_experts: int = 8) -> Trace:
    """One layer, ids [token, slot], documents of four tokens."""
    sequence = np.arange(len(ids)) // 4
    return Trace.from_arrays(
        ids[:, None],
        n_experts=n_experts,
        router_logits=None if logits is None else logits[:, None],
        tokens={"sequence": sequence},
    )


def test_switch_loss_of_perfect_balance_is_k_and_of_collapse_is_nearly_e():
    turns = np.stack([np.arange(32) % 8, (np.arange(32) + 1) % 8], -1)
    balanced = load_balance(routed(turns, np.zeros((32, 8))), bootstrap=QUICK)["estimate"].sel(layer=0)
    np.testing.assert_allclose(balanced, [0, 1, 2], atol=1e-6)
    logits = np.zeros((32, 8))
    logits[:, 2] = 20
    logits[:, 5] = 10
    collapsed = load_balance(routed(np.tile([2, 5], (32, 1)), logits), bootstrap=QUICK)["estimate"].sel(layer=0)
    assert collapsed.sel(measure="switch_loss") == pytest.approx(8, rel=1e-3)
    assert collapsed.sel(measure="max_over_mean") == pytest.approx(4)


def test_load_balance_without_logits_says_what_is_missing(make_trace):
    found = load_balance(make_trace(logits=False), bootstrap=QUICK)
    assert np.isnan(found["estimate"].sel(measure="switch_loss")).all()
    assert np.isfinite(found["estimate"].sel(measure="cv")).all()
    assert found.attrs["missing"] == "switch_loss needs router_logits"


def test_routing_entropy_by_hand(make_trace, tokens_of, in_small_blocks):
    trace = in_small_blocks(make_trace())
    found = routing_entropy(trace, by="source", bootstrap=QUICK)["estimate"]
    for source in "ab":
        tokens = [t for t in tokens_of(trace) if t.row.source == source]
        for layer in range(trace.n_layers):
            bits = [-sum(p * math.log2(p) for p in softmax(t.router_logits[layer])) for t in tokens]
            assert found.sel(source=source, layer=layer) == pytest.approx(sum(bits) / len(bits), rel=1e-5)


def test_entropy_is_log2_e_for_equal_logits_and_ignores_masked_experts():
    equal = np.zeros((8, 8))
    ids = np.tile([0, 1], (8, 1))
    assert routing_entropy(routed(ids, equal))["estimate"].item() == pytest.approx(3)
    masked = equal.copy()
    masked[:, 4:] = -np.inf
    assert routing_entropy(routed(ids, masked))["estimate"].item() == pytest.approx(2)


def test_entropy_without_logits_is_refused(make_trace):
    with refused(MissingSignal, "router_logits", "routing_entropy"):
        routing_entropy(make_trace(logits=False))


def test_router_confidence_by_hand(make_trace, tokens_of, in_small_blocks):
    trace = in_small_blocks(make_trace())
    found = router_confidence(trace, bootstrap=QUICK)["estimate"]
    tokens = tokens_of(trace)
    for layer in range(trace.n_layers):
        sums = np.zeros(3)
        for t in tokens:
            p = sorted(softmax(t.router_logits[layer]), reverse=True)
            sums += [p[0], p[0] - p[1], t.weight[layer][1] / t.weight[layer][0]]
        np.testing.assert_allclose(found.sel(layer=layer), sums / len(tokens), rtol=1e-5)


def test_router_confidence_takes_what_there_is(make_trace):
    weights_only = router_confidence(make_trace(logits=False), bootstrap=QUICK)
    assert np.isnan(weights_only["estimate"].sel(measure=["p1", "p1_minus_p2"])).all()
    assert np.isfinite(weights_only["ci_low"].sel(measure="w2_over_w1")).all()
    assert weights_only.attrs["missing"] == "p1 and p1_minus_p2 need router_logits"
    with refused(MissingSignal, "signals", ("router_logits", "weight")):
        router_confidence(make_trace(logits=False, weight=False))


def test_position_profile_by_hand(make_trace, tokens_of, in_small_blocks):
    trace = in_small_blocks(make_trace())
    edges = (1, 4, 10, 100)
    found = position_profile(trace, edges=edges, bootstrap=QUICK)
    assert found["estimate"].dims == ("position_bin", "layer", "expert")
    assert list(found["position_bin"].values) == ["1-3", "4-9", "10-99", "100+"]
    tokens = tokens_of(trace)
    for i, (start, stop) in enumerate(pairwise(edges)):
        inside = [t for t in tokens if start <= t.position < stop]
        assert found["n"][i] == len(inside)
        for layer in range(trace.n_layers):
            for expert in range(8):
                expected = sum(expert in t.expert_id[layer] for t in inside) / (2 * len(inside))
                assert found["estimate"][i, layer, expert] == pytest.approx(expected)
    assert found["n"][3] == 0
    assert np.isnan(found["estimate"][3]).all()


def test_position_bins_double_up_to_the_longest_sequence(make_trace):
    trace = make_trace()
    found = position_profile(trace, bootstrap=QUICK)
    assert found["position_start"].values[:4].tolist() == [0, 1, 2, 4]
    assert found["position_start"].values[-1] < trace.sequences.length.max()
    assert (found["n"] > 0).all()
    assert found["n"].sum() == trace.n_tokens


def test_position_edges_must_ascend(make_trace):
    with refused(BadInput, "edges", [4, 2]):
        position_profile(make_trace(), edges=[4, 2])
