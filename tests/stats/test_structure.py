"""Nested-loop oracles for repetition, coactivation and transitions."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens.errors import BadInput
from mixlens.stats import Bootstrap, coactivation, repetition, transitions

QUICK = Bootstrap(replicates=20)


def repeated_by_hand(tokens, layer):
    pairs = [(a, b) for a, b in pairwise(tokens) if a.sequence == b.sequence and b.position == a.position + 1]
    first = sum(a.expert_id[layer][0] == b.expert_id[layer][0] for a, b in pairs)
    either = sum(bool(set(a.expert_id[layer]) & set(b.expert_id[layer])) for a, b in pairs)
    return len(pairs), first / len(pairs), either / len(pairs)


@pytest.mark.parametrize("shape", [{}, {"n_experts": 5, "top_k": 3}])
def test_repetition_by_hand(make_trace, tokens_of, in_small_blocks, shape):
    trace = in_small_blocks(make_trace(**shape))
    found = repetition(trace, bootstrap=QUICK)
    for layer in range(trace.n_layers):
        n, first, either = repeated_by_hand(tokens_of(trace), layer)
        assert found["n"] == n
        np.testing.assert_allclose(found["estimate"].sel(layer=layer), [first, either])


def test_repetition_does_not_count_across_gaps(make_trace, tokens_of):
    trace = make_trace(vocabulary=4).select(tokens=[0, 1, 2], layers=[2])
    found = repetition(trace, by="domain", bootstrap=QUICK)
    for domain in "xy":
        n, first, either = repeated_by_hand([t for t in tokens_of(trace) if t.row.domain == domain], 0)
        assert found["n"].sel(domain=domain) == n
        np.testing.assert_allclose(found["estimate"].sel(domain=domain, layer=2), [first, either])


def test_repetition_of_random_routing_is_that_of_the_paper(make_trace):
    assert repetition(make_trace(), bootstrap=QUICK).attrs["uniform"] == [0.125, pytest.approx(0.4643, abs=5e-5)]


def test_a_sequence_of_one_token_has_no_pair(make_trace):
    found = repetition(make_trace().select(positions=(0, 1)), bootstrap=QUICK)
    assert found["n"] == 0
    assert np.isnan(found["estimate"]).all()
    assert np.isnan(found["ci_low"]).all()


@pytest.mark.parametrize("shape", [{}, {"n_experts": 64, "top_k": 8, "n_layers": 2}])
def test_coactivation_by_hand(make_trace, tokens_of, in_small_blocks, shape):
    trace = in_small_blocks(make_trace(**shape))
    found = coactivation(trace, bootstrap=QUICK)
    assert found["estimate"].dims == ("layer", "expert", "expert_j")
    e = trace.n_experts
    for layer in range(trace.n_layers):
        single, pair = [0] * e, [[0] * e for _ in range(e)]
        for t in tokens_of(trace):
            for i in t.expert_id[layer]:
                single[i] += 1
                for j in t.expert_id[layer]:
                    pair[i][j] += 1
        np.testing.assert_array_equal(found["n"].sel(layer=layer), single)
        for i in range(e):
            expected = [math.nan if i == j or not single[i] else pair[i][j] / single[i] for j in range(e)]
            np.testing.assert_allclose(found["estimate"].sel(layer=layer, expert=i), expected)
    chosen = found["n"] > 0
    sums = found["estimate"].sum("expert_j").where(chosen)
    np.testing.assert_allclose(sums.values[chosen.values], trace.top_k - 1)


def test_coactivation_needs_two_experts_a_token(make_trace):
    with refused(BadInput, "top_k", 1):
        coactivation(make_trace(top_k=1))


@pytest.mark.parametrize("gap", [1, 2])
def test_transitions_by_hand(make_trace, tokens_of, in_small_blocks, gap):
    trace = in_small_blocks(make_trace())
    found = transitions(trace, by="domain", gap=gap, bootstrap=QUICK)
    assert found["layer"].values.tolist() == list(range(4 - gap))
    for domain in "xy":
        tokens = [t for t in tokens_of(trace) if t.row.domain == domain]
        for layer in range(4 - gap):
            joint = np.zeros((8, 8))
            for t in tokens:
                joint[t.expert_id[layer][0], t.expert_id[layer + gap][0]] += 1
            here = found.sel(domain=domain, layer=layer)
            for i in range(8):
                if joint[i].sum():
                    np.testing.assert_allclose(here["estimate"].sel(expert=i), joint[i] / joint[i].sum())
                else:
                    assert np.isnan(here["estimate"].sel(expert=i)).all()
            p = joint / joint.sum()
            bits = 0.0
            for i in range(8):
                for j in range(8):
                    if p[i, j]:
                        bits += p[i, j] * math.log2(p[i, j] / (p[i].sum() * p[:, j].sum()))
            assert here["mi_bits"] == pytest.approx(bits)


def test_transitions_follow_layer_numbers_of_a_selection(make_trace):
    whole, part = (transitions(t, gap=2, bootstrap=QUICK) for t in (make_trace(), make_trace().select(layers=[1, 3])))
    assert part["layer"].values.tolist() == [1]
    np.testing.assert_array_equal(part["estimate"].sel(layer=1), whole["estimate"].sel(layer=1))
    with refused(BadInput, "gap", 1):
        transitions(make_trace().select(layers=[1, 3]))
