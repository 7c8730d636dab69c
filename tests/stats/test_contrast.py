"""Contrasts against loops, scipy and what is true by making."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.clustered import SHARES, clustered
from helpers.refusals import refused

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
    # By hand: every split of the documents into two halves.
    ids, sequence = trace.read("expert_id")[:, 1, 0], trace.read("sequence")
    counts = np.array([np.bincount(ids[sequence == d], minlength=8) for d in range(12)])
    rng, hits = np.random.default_rng(5), np.zeros(8)
    observed = counts[::2].sum(0) / counts[::2].sum() - counts[1::2].sum(0) / counts[1::2].sum()
    for _ in range(4000):
        order = rng.permutation(12)
        one, two = counts[order[:6]].sum(0), counts[order[6:]].sum(0)
        hits += np.abs(one / one.sum() - two / two.sum()) >= np.abs(observed) - 1e-12
    np.testing.assert_allclose(found.p.sel(layer=1), (1 + hits) / 4001, atol=0.03)


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


def test_short_documents_against_long_ones_are_seldom_a_difference():
    """Their shares scatter more, so that permuted groups differ less than the groups themselves."""
    alarms = 0
    for seed in range(16):
        rng = np.random.default_rng(seed)
        short = np.arange(40) % 4 == 0
        document = np.repeat(np.arange(40), np.where(short, 12, 100))
        ids = rng.permuted(np.tile(np.arange(8), (len(document), 3, 1)), axis=-1)[..., :2]
        table = pd.DataFrame({"short": short})
        trace = ml.Trace.from_arrays(ids, n_experts=8, tokens={"sequence": document}, sequences=table)
        alarms += bool(ml.stats.contrast(trace, ml.stats.expert_share, by="short").survives.any())
    assert alarms <= 5  # it was four in five without standard errors
