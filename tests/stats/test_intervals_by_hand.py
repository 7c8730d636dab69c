"""Intervals document by document, with scipy's distributions, for every way that documents are grouped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import loops
from helpers.traces import made

import mixlens as ml
from mixlens.stats import Bootstrap

QUICK = Bootstrap(level=0.8)
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


@pytest.mark.parametrize("bootstrap", [QUICK, Bootstrap(level=0.95)])
def test_shares_of_groups_of_documents_of_several_sequences(bootstrap):
    """Not sequences for documents, not documents of equal weight; also where all documents are alike."""
    found = ml.stats.expert_share(CASE.trace, by="domain", bootstrap=bootstrap)
    for domain in "xyz":
        documents = documents_of(loops.tokens_of(CASE, domain))
        assert int(found.n_documents.sel(domain=domain)) == len(documents)
        sizes = [2 * len(tokens) for tokens in documents.values()]
        for place, layer in enumerate(CASE.layers):
            for expert in range(5):
                rows = [
                    np.array([sum(expert in loops.of_experts(CASE, place, t) for t in tokens), 2 * len(tokens)])
                    for tokens in documents.values()
                ]
                cell = found.sel(domain=domain, layer=layer, expert=expert)
                assert_bounds(cell, loops.interval(rows, lambda s: s[0] / s[1], sizes, bootstrap.level, "share"))


def test_a_biased_statistic_has_its_bias_taken_off_and_stops_at_its_floor():
    found = ml.stats.load_balance(CASE.trace, by="domain", bootstrap=QUICK)
    for domain in "xy":
        documents = documents_of(loops.tokens_of(CASE, domain))
        sizes = [len(tokens) for tokens in documents.values()]
        for place, layer in enumerate(CASE.layers):
            rows = [
                np.array([sum(e in loops.of_experts(CASE, place, t) for t in tokens) for e in range(5)])
                for tokens in documents.values()
            ]
            squared = loops.interval(rows, lambda s: s.var() / s.mean() ** 2, sizes, QUICK.level, "smooth", 0.0)
            assert_bounds(found.sel(domain=domain, layer=layer, measure="cv"), np.sqrt(squared))


def test_the_largest_share_is_bounded_by_those_that_may_be_the_largest():
    found = ml.stats.load_balance(CASE.trace, bootstrap=Bootstrap(level=0.95)).sel(measure="max_over_mean")
    documents = documents_of(loops.tokens_of(CASE))
    sizes = [2 * len(tokens) for tokens in documents.values()]
    for place, layer in enumerate(CASE.layers):
        of_expert = [
            [np.array([sum(e in loops.of_experts(CASE, place, t) for t in tokens), 2 * len(tokens)]) for tokens in
             documents.values()]
            for e in range(5)
        ]  # fmt: skip

        def bounds(tail, of_expert=of_expert):
            return [loops.interval(rows, lambda s: s[0] / s[1], sizes, 1 - 2 * tail, "share") for rows in of_expert]

        largest_low = max(low for low, _ in bounds(0.025))
        rivals = max(2, sum(high >= largest_low for _, high in bounds(0.025)))
        below = 1.35 * 0.05 / rivals
        low, high = max(b[0] for b in bounds(below)), max(b[1] for b in bounds(0.05 - below))
        assert_bounds(found.sel(layer=layer), (max(5 * low, 1), 5 * high))


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
    low, high = loops.interval(rows, loops.information_bits, sizes, QUICK.level, "smooth", 0.0)
    np.testing.assert_allclose([float(here.mi_ci_low), float(here.mi_ci_high)], [low, high], rtol=1e-6)


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
                with np.errstate(invalid="ignore", divide="ignore"):
                    expected = loops.interval(rows, lambda s, j=j: s[j] / s[-1], sizes, QUICK.level, "share")
                assert_bounds(cell, expected)
                known += math.isfinite(expected[0])
    assert known > 10


def test_entropies_are_means_of_what_is_never_negative():
    found = ml.stats.routing_entropy(CASE.trace, bootstrap=QUICK)
    documents = documents_of(loops.tokens_of(CASE))
    for place, layer in enumerate(CASE.layers):
        bits = [
            sum(loops.entropy_bits(loops.softmax(CASE.router_logits[t, place])) for t in tokens)
            for tokens in documents.values()
        ]
        sizes = [len(tokens) for tokens in documents.values()]
        rows = [np.array(row) for row in zip(bits, sizes, strict=True)]
        assert_bounds(found.sel(layer=layer), loops.interval(rows, lambda s: s[0] / s[1], sizes, QUICK.level, "mean"))
