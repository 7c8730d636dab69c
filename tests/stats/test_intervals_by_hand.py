"""Intervals draw by draw: the bootstrap written out with numpy and scipy, for every way that documents are grouped."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from helpers import loops
from helpers.traces import made
from scipy import stats as scipy_stats

import mixlens as ml
from mixlens.stats import Bootstrap

QUICK = Bootstrap(replicates=40, seed=3, level=0.8)
# Documents of several sequences, of two groups with equally many documents each, and one alone in a third.
CASE = made(
    (9, 1, 7, 12, 3, 5, 8, 2, 6, 11, 4),
    layers=(1, 4),
    experts=5,
    documents=("a", "b", "a", "c", "d", "e", "f", "f", "g", "h", "i"),
    domains=("y", "x", "y", "x", "x", "y", "y", "y", "x", "y", "z"),
)


def documents_of(tokens: list[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for t in tokens:
        found.setdefault(CASE.of_tokens("document_id")[t], []).append(t)
    return found


def assert_bounds(cell, expected):
    low, high = expected
    np.testing.assert_allclose([float(cell.ci_low), float(cell.ci_high)], [low, high], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("bootstrap", [QUICK, Bootstrap(replicates=60, seed=11, level=0.95)])
def test_each_group_has_draws_of_its_own(bootstrap):
    """Not one stream for all groups, not sequences for documents, not documents of equal weight."""
    found = ml.stats.expert_share(CASE.trace, by="domain", bootstrap=bootstrap)
    for group, domain in enumerate("xyz"):
        documents = documents_of(loops.tokens_of(CASE, domain))
        assert int(found.n_documents.sel(domain=domain)) == len(documents)
        sizes = [len(tokens) for tokens in documents.values()]
        for place, layer in enumerate(CASE.layers):
            for expert in range(5):
                rows = [
                    np.array([sum(expert in loops.of_experts(CASE, place, t) for t in tokens), len(tokens)])
                    for tokens in documents.values()
                ]
                cell = found.sel(domain=domain, layer=layer, expert=expert)
                if len(rows) > 1 and len({row[0] / row[1] for row in rows}) == 1:
                    continue
                expected = loops.interval(rows, lambda s: s[0] / (2 * s[1]), sizes, bootstrap, group, proportion=True)
                assert_bounds(cell, expected)


def test_groups_of_the_same_documents_have_other_draws():
    lengths = tuple(range(2, 72))
    one = made(lengths, experts=4, documents=tuple(map(str, lengths)), domains=("x",) * 70)
    ids = np.concatenate([one.expert_id] * 2)
    table = one.sequences.assign(domain="y", document_id=[f"{n} again" for n in lengths])
    twice = ml.Trace.from_arrays(
        ids,
        n_experts=4,
        tokens={"sequence": np.concatenate([one.sequence, one.sequence + 70])},
        sequences=pd.concat([one.sequences, table], ignore_index=True),
    )
    found = ml.stats.load_balance(twice, by="domain", bootstrap=QUICK).sel(measure="cv")
    np.testing.assert_array_equal(found.estimate.sel(domain="x"), found.estimate.sel(domain="y"))
    assert not np.array_equal(found.ci_low.sel(domain="x"), found.ci_low.sel(domain="y"))


def test_a_biased_statistic_has_its_bias_taken_off_twice_and_stops_at_its_floor():
    found = ml.stats.load_balance(CASE.trace, by="domain", bootstrap=QUICK)
    for group, domain in enumerate("xy"):
        documents = documents_of(loops.tokens_of(CASE, domain))
        sizes = [len(tokens) for tokens in documents.values()]
        for place, layer in enumerate(CASE.layers):
            rows = [
                np.array([sum(e in loops.of_experts(CASE, place, t) for t in tokens) for e in range(5)])
                for tokens in documents.values()
            ]
            for measure, statistic, floor in (
                ("cv", lambda s: s.std() / s.mean(), 0.0),
                ("max_over_mean", lambda s: s.max() / s.mean(), 1.0),
            ):
                cell = found.sel(domain=domain, layer=layer, measure=measure)
                if measure == "max_over_mean":  # of so few documents it would cover too little
                    assert np.isnan(cell.ci_low)
                    continue
                assert_bounds(cell, loops.interval(rows, statistic, sizes, QUICK, group, floor))


@pytest.mark.parametrize("n", [19, 24])
def test_mutual_information_of_transitions(n):
    rng = np.random.default_rng(0)
    case = made(tuple(rng.integers(3, 9, n)), layers=(1, 4), experts=3, documents=tuple(map(str, range(n))))
    found = ml.stats.transitions(case.trace, gap=3, bootstrap=QUICK)
    here = found.sel(layer=1)
    if n < 20:
        assert np.isnan(here.mi_ci_low)
        return
    rows = [loops.moves(case, 0, 1, np.flatnonzero(case.sequence == d).tolist()) for d in range(n)]
    sizes = [(case.sequence == d).sum() for d in range(n)]
    low, high = loops.interval(rows, loops.information_bits, sizes, QUICK, 0, floor=0.0)
    np.testing.assert_allclose([float(here.mi_ci_low), float(here.mi_ci_high)], [low, high], rtol=2e-3, atol=2e-4)


def test_a_ratio_whose_denominator_some_documents_lack():
    """The effective number of documents counts what stands below the line: tokens that chose the expert."""
    found = ml.stats.coactivation(CASE.trace, bootstrap=QUICK)
    documents = documents_of(loops.tokens_of(CASE))
    known = 0
    for place, layer in enumerate(CASE.layers):
        for i in range(5):
            rows = []
            for tokens in documents.values():
                having = [t for t in tokens if i in loops.of_experts(CASE, place, t)]
                both = [sum(j in loops.of_experts(CASE, place, t) for t in having) for j in range(5)]
                rows.append(np.array([*both, len(having)]))
            sizes = [row[-1] for row in rows]
            for j in range(5):
                if i == j or not sum(sizes):
                    continue
                cell = found.sel(layer=layer, expert=i, expert_j=j)
                if len({row[j] / row[-1] for row in rows if row[-1]}) == 1:
                    continue
                with np.errstate(invalid="ignore", divide="ignore"):
                    expected = loops.interval(rows, lambda s, j=j: s[j] / s[-1], sizes, QUICK, 0, proportion=True)
                assert_bounds(cell, expected)
                known += math.isfinite(expected[0])
    assert known > 10


def test_draws_within_groups_keep_every_group_s_size():
    group = np.array([0, 1, 0, 2, 1, 0, 2])
    weights = QUICK.resample_within(group).weights
    assert weights.shape == (1 + QUICK.replicates, 7)
    assert (weights[0] == 1).all()
    for stream, label in enumerate((0, 1, 2)):
        members = np.flatnonzero(group == label)
        assert (weights[:, members].sum(1) == len(members)).all()
        drawn = np.random.default_rng([3, stream]).integers(len(members), size=(QUICK.replicates, len(members)))
        counted = [[(row == one).sum() for one in range(len(members))] for row in drawn]
        np.testing.assert_array_equal(weights[1:, members], counted)


@pytest.mark.parametrize("groups", [1, 3])
def test_reach_of_documents_drawn_within_groups(groups):
    n = np.array([4.5, 10, 40])
    expected = np.sqrt(n / (n - groups)) * scipy_stats.t.ppf(0.9, np.maximum(n - groups, 1))
    np.testing.assert_allclose(QUICK.reach(n, groups), expected, rtol=1e-3)


def test_the_jackknife_is_for_few_documents_and_every_document_is_left_out_once():
    few, many = QUICK.resample(256), QUICK.resample(257)
    assert (few.n_left_out, many.n_left_out) == (256, 0)
    np.testing.assert_array_equal(few.weights[1:257], 1 - np.eye(256))
    assert few.weights.shape == (1 + 256 + 40, 256)
    assert many.weights.shape == (1 + 40, 257)
