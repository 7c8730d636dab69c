"""Contrasts against loops, scipy and what is true by making."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.clustered import SHARES, clustered
from helpers.refusals import refused
from scipy import stats as scipy_stats
from scipy.optimize import nnls

import mixlens as ml
from mixlens.errors import BadInput

OTHER = SHARES[::-1]


def made(rng, shares, label, **settings):
    ids, tokens, table = clustered(
        rng, shares, n_documents=len(label), spread=0.5, concentration=30,
        sequences=pd.DataFrame({"domain": label}), **{"n_layers": 3, **settings},
    )  # fmt: skip
    return ml.Trace.from_arrays(ids[..., None], n_experts=8, tokens=tokens, sequences=table)


def test_adjusted_is_the_smallest_rate_at_which_a_value_is_found():
    p = np.random.default_rng(0).random((5, 7)) ** 2
    p[2, 3] = np.nan
    m = np.isfinite(p).sum()
    for value, q in zip(p.flat, ml.stats.adjusted(p).flat, strict=True):
        rates = [m * above / (p <= above).sum() for above in p.flat if above >= value]
        assert q == pytest.approx(min([1.0, *rates])) if np.isfinite(value) else np.isnan(q)
    assert np.isnan(ml.stats.adjusted(np.full(3, np.nan))).all()


def test_the_difference_is_that_of_the_groups_and_p_that_of_loops():
    trace = made(np.random.default_rng(1), SHARES, np.arange(12) % 2, length=40)
    found = ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a=0, b=1)
    of_groups = ml.stats.expert_share(trace, by="domain").estimate
    np.testing.assert_allclose(found.estimate, of_groups.sel(domain=0) - of_groups.sel(domain=1), atol=1e-12)
    # By hand: documents dealt out at random, differences in standard errors of each group and of usual documents.
    ids, sequence = trace.read("expert_id")[:, 1, 0], trace.read("sequence")
    counts = np.array([np.bincount(ids[sequence == d], minlength=8) for d in range(12)])
    long = counts.sum(1)
    apart = counts - np.outer(long, counts.sum(0) / long.sum())
    usual = [nnls(np.stack([np.ones(12), long], 1), apart[:, e] ** 2 / long * 12 / 11)[0] for e in range(8)]

    def errors(one, at_least):
        n, own = len(one), counts[one].sum(0) / long[one].sum()
        of_group = [sum((counts[d, e] - long[d] * own[e]) ** 2 for d in one) * n / (n - 1) for e in range(8)]
        as_usual = [sum(alone * long[d] + together * long[d] ** 2 for d in one) for alone, together in usual]
        return np.maximum(of_group, as_usual if at_least else 0) / long[one].sum() ** 2

    def far(order, at_least):
        one, two = order[:6], order[6:]
        difference = counts[one].sum(0) / long[one].sum() - counts[two].sum(0) / long[two].sum()
        return np.abs(difference) / np.sqrt(errors(one, at_least) + errors(two, at_least))

    rng, seen = np.random.default_rng(5), np.concatenate([np.arange(0, 12, 2), np.arange(1, 12, 2)])
    hits = sum(
        np.array([far(order, kind) >= far(seen, kind) * (1 - 1e-9) for kind in (False, True)])
        for order in (rng.permutation(12) for _ in range(1500))
    )
    variances = [errors(group, at_least=False) for group in (seen[:6], seen[6:])]
    freedom = sum(variances) ** 2 / sum(v**2 / 5 for v in variances)
    welch = 2 * scipy_stats.t.sf(far(seen, at_least=False), freedom)
    np.testing.assert_allclose(found.p.sel(layer=1), np.maximum((hits / 1500).max(0), welch), atol=0.035)


@pytest.mark.parametrize("n_documents", [6, 10, 40])
def test_of_equal_groups_hardly_ever_a_cell_survives(n_documents):
    alarms = []
    for seed in range(80):
        trace = made(np.random.default_rng(seed), SHARES, np.arange(n_documents) % 2)
        alarms.append(bool(ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a=0).survives.any()))
    assert np.mean(alarms) <= 0.11  # 5 %, and two and a half standard errors


def test_groups_that_differ_are_told_apart_and_documents_of_both_are_paired():
    label = np.arange(40) % 2
    shares = np.stack([SHARES, OTHER])[label]
    apart = ml.stats.contrast(made(np.random.default_rng(2), shares, label), ml.stats.expert_share, by="domain", a=0)
    assert apart.survives.mean() > 0.6
    assert (np.sign(apart.estimate.where(apart.survives)) == np.sign(SHARES - OTHER)).where(apart.survives).all()
    assert not apart.attrs["paired"]
    one = made(np.random.default_rng(3), SHARES, label)
    itself = ml.stats.contrast(one, one, ml.stats.expert_share)
    assert itself.attrs["paired"]
    assert not itself.survives.any()
    np.testing.assert_array_equal(itself.estimate, 0)


def test_booleans_tell_groups_apart_and_figures_colour_survivors_alone():
    label = np.arange(40) % 2
    trace = made(np.random.default_rng(2), np.stack([SHARES, OTHER])[label], label)
    found = ml.stats.contrast(trace, ml.stats.load_balance, by=trace.sequences["domain"] == 0)
    assert found.estimate.dims == ("layer", "measure")
    found = ml.stats.contrast(trace, ml.stats.expert_share, by=trace.sequences["domain"] == 0)
    ax = ml.show.contrast(found)
    drawn = ax.collections[0].get_array()
    assert int((~np.ma.getmaskarray(drawn)).sum()) == int(found.survives.sum())


def test_what_cannot_be_contrasted():
    trace = made(np.random.default_rng(2), SHARES, np.array([0, 0, 0, 1]))
    with refused(BadInput, "by", "domein"):
        ml.stats.contrast(trace, ml.stats.expert_share, by="domein", a=0)
    with refused(BadInput, "by", "domain 7"):
        ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a=7)
    with refused(BadInput, "by", "domain 1"):
        ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a=1)
    with refused(BadInput, "by"):
        ml.stats.contrast(trace, ml.stats.expert_share)
    with refused(BadInput, "statistic"):
        ml.stats.contrast(trace, ml.stats.domain_information, by="domain", a=0, b=0)


@pytest.mark.parametrize(("short", "long"), [(5, 15), (10, 30)])
def test_few_short_documents_against_long_ones_are_seldom_a_difference(short, long):
    """Their shares scatter more, so that permuted groups differ less than the groups themselves."""
    alarms = np.zeros(3)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        domain = np.repeat(["short", "long"], [short, long])
        document = np.repeat(np.arange(short + long), np.where(domain == "short", 12, 72))
        ids = rng.permuted(np.tile(np.arange(8), (len(document), 3, 1)), axis=-1)[..., :2]
        table = pd.DataFrame({"domain": domain})
        trace = ml.Trace.from_arrays(ids, n_experts=8, tokens={"sequence": document}, sequences=table)
        found = (
            ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a="short"),
            ml.stats.domain_distance(trace),
            ml.stats.domain_information(trace),
        )
        alarms += [bool(data.survives.any()) for data in found]
    assert (alarms <= 6).all()  # 5 %, and two and a half standard errors; it was 11 % and more of all three
