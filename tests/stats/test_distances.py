"""Distances between domains, entropy of loads and partial pooling, against scipy, loops and what is true by making."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.clustered import SHARES, clustered
from helpers.refusals import refused
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, t

import mixlens as ml
from mixlens.errors import BadInput


def routed(seed: int, *, n_documents: int = 40, groups: int = 4, other: bool = False) -> ml.Trace:
    """Documents of several domains with the same shares; the first domain has others where `other`."""
    label = np.arange(n_documents) % groups
    shares = np.stack([SHARES[::-1] if other and not g else SHARES for g in label])
    ids, tokens, table = clustered(
        np.random.default_rng(seed), shares, n_documents=n_documents, spread=0.5, concentration=30, n_layers=2,
        sequences=pd.DataFrame({"domain": [f"d{g}" for g in label]}),
    )  # fmt: skip
    return ml.Trace.from_arrays(ids[..., None], n_experts=8, layers=[3, 9], tokens=tokens, sequences=table)


def test_plain_distances_are_scipys_and_symmetric():
    trace = routed(0, other=True)
    found, share = ml.stats.domain_distance(trace), ml.stats.expert_share(trace, by="domain").estimate
    for layer in (3, 9):
        for one in share.domain.values:
            for two in share.domain.values:
                cell = found.sel(layer=layer, domain=one, domain_other=two)
                f, g = (share.sel(layer=layer, domain=name).values for name in (one, two))
                assert float(cell.plain) == pytest.approx(jensenshannon(f, g, base=2) ** 2, abs=1e-12)
                twin = found.sel(layer=layer, domain=two, domain_other=one)
                np.testing.assert_array_equal(cell.to_array(), twin.to_array())
    assert found.n.values.tolist() == [10] * 4
    assert found.attrs["cells"] == 2 * 6


def test_the_bias_of_a_pair_is_the_jackknifes_by_loops():
    trace = routed(1, n_documents=9, groups=2)
    ids, sequence = trace.read("expert_id")[:, 0, 0], trace.read("sequence")
    counts = np.array([np.bincount(ids[sequence == d], minlength=8) for d in range(9)])

    def distance(*left_out):
        kept = [[d for d in range(g, 9, 2) if d not in left_out] for g in (0, 1)]
        return jensenshannon(*(counts[rows].sum(0) for rows in kept), base=2) ** 2

    whole = distance()
    bias = sum((len(range(g, 9, 2)) - 1) * (np.mean([distance(d) for d in range(g, 9, 2)]) - whole) for g in (0, 1))
    cell = ml.stats.domain_distance(trace).sel(layer=3, domain="d0", domain_other="d1")
    assert float(cell.estimate) == pytest.approx(max(whole - bias, 0), abs=1e-10)


def test_of_equal_domains_hardly_ever_a_pair_survives_and_the_distance_is_less_biased():
    found = [ml.stats.domain_distance(routed(seed)) for seed in range(25)]
    above = np.triu_indices(4, 1)
    plain, estimate = (np.mean([one[name].values[:, *above] for one in found]) for name in ("plain", "estimate"))
    assert estimate < plain / 2
    assert np.mean([bool(one.survives.any()) for one in found]) <= 0.16
    assert np.mean([one.ci_low.values[:, *above] <= 0 for one in found]) >= 0.9


def test_a_domain_that_differs_is_told_apart_from_each_other_and_these_not_from_one_another():
    found = ml.stats.domain_distance(routed(2, other=True))
    assert found.survives.sel(domain="d0").drop_sel(domain_other="d0").all()
    assert not found.survives.drop_sel(domain="d0", domain_other="d0").any()


def test_one_document_has_a_distance_and_no_test():
    found = ml.stats.domain_distance(routed(0, n_documents=5, groups=4))
    alone = found.sel(domain="d1", domain_other="d2", layer=3)
    assert float(alone.plain) > 0
    assert np.isnan([alone.p, alone.ci_low, alone.ci_high]).all()
    assert not alone.survives
    with refused(BadInput, "by", "domain"):
        ml.stats.domain_distance(routed(0, groups=1))


def test_the_entropy_of_loads_is_scipys_and_its_interval_knows_the_bias():
    trace = routed(0)
    found, share = ml.stats.load_entropy(trace), ml.stats.expert_share(trace).estimate
    np.testing.assert_allclose(found.estimate, entropy(share, base=2, axis=1))
    held = [
        (one.ci_low <= entropy(SHARES, base=2)) & (one.ci_high >= entropy(SHARES, base=2))
        for one in (ml.stats.load_entropy(routed(seed, n_documents=12)) for seed in range(60))
    ]
    assert np.mean(held) >= 0.9
    assert (found.ci_high <= 3).all()


def test_partial_pooling_by_hand():
    """DerSimonian and Laird's tau, and a mean weighted with it, group by group."""
    share = ml.stats.expert_share(routed(3, other=True), by="domain")
    found = ml.stats.partial_pooling(share).sel(layer=9, expert=2)
    one = share.sel(layer=9, expert=2)

    reach = t.isf(0.025, one.n_effective - 1)
    y, v = one.estimate.values, (((one.ci_high - one.ci_low).values / 2) / reach) ** 2
    w = 1 / v
    fixed = sum(w * y) / sum(w)
    tau2 = max(0, (sum(w * (y - fixed) ** 2) - 3) / (sum(w) - sum(w**2) / sum(w)))
    w = 1 / (v + tau2)
    mean = sum(w * y) / sum(w)
    assert float(found.between) == pytest.approx(tau2**0.5)
    np.testing.assert_allclose(found.shrinkage, v / (v + tau2))
    np.testing.assert_allclose(found.estimate, mean + tau2 / (v + tau2) * (y - mean))
    np.testing.assert_array_equal(found.unpooled, y)


def test_pooled_estimates_of_small_domains_are_nearer_to_the_truth_and_hold_it():
    error, held = [], []
    for seed in range(12):
        share = ml.stats.expert_share(routed(seed, n_documents=24, groups=6), by="domain")
        pooled = ml.stats.partial_pooling(share)
        error.append([float(((data.estimate - SHARES) ** 2).mean()) for data in (share, pooled)])
        held.append(float(((pooled.ci_low <= SHARES) & (pooled.ci_high >= SHARES)).mean()))
        assert "survives" not in pooled
    before, after = np.mean(error, axis=0)
    assert after < 0.6 * before
    assert np.mean(held) > 0.93
    with refused(BadInput, "over", "domain"):
        ml.stats.partial_pooling(ml.stats.expert_share(routed(0)))


def test_a_column_may_be_called_like_a_variable_of_the_result():
    trace = routed(2)
    trace.sequences["value"] = trace.sequences["domain"]
    found, expected = ml.stats.domain_distance(trace, by="value"), ml.stats.domain_distance(trace)
    np.testing.assert_array_equal(found["estimate"], expected["estimate"])
    assert found["estimate"].dims == ("layer", "document_value", "document_value_other")
