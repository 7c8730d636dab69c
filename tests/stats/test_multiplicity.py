"""Many cells at once: p against oracles, and of data without an effect hardly ever a claim."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.clustered import SHARES, clustered
from helpers.inside import p_against
from scipy import stats as scipy_stats

import mixlens as ml

UNIFORM = np.full(8, 1 / 8)
QUICK = ml.stats.Bootstrap(replicates=50)


def routed(rng, n_documents: int, shares=UNIFORM, *, slots: int = 1, **settings) -> ml.Trace:
    """A trace of 3 layers whose documents differ; `settings` as of `clustered`."""
    settings = {"spread": 0.5, "concentration": 20, "length": 40, "n_layers": 3 * slots} | settings
    ids, tokens, table = clustered(rng, shares, n_documents=n_documents, **settings)
    ids = ids.reshape(len(ids), 3, slots)
    for slot in range(1, slots):  # a token chooses an expert once
        ids[..., slot] = (ids[..., 0] + 1 + ids[..., slot] % 7) % 8
    return ml.Trace.from_arrays(ids, n_experts=8, tokens=tokens, sequences=table)


def measured(rng, n_documents: int, effect: float = 0.0) -> xr.Dataset:
    """Sums of an importance run whose changes are as often gains as losses, plus `effect` for expert 0."""
    tokens = np.maximum(5, rng.lognormal(3, 0.5, n_documents)).astype(int)
    change = rng.laplace(size=(n_documents, 4, 8)) * tokens[:, None, None]
    change[..., 0] += effect * tokens[:, None]
    inner = ("document", "layer", "expert")
    return xr.Dataset(
        {"change": (inner, change), "chosen": (inner, np.ones_like(change)), "value": ("document", tokens * 3.0)}
        | dict.fromkeys(("tokens", "length"), ("document", tokens)),
        {"layer": range(4), "expert": range(8)},
        {"kind": "importance", "model": "m", "metric": "loss", "unit": "nats", "how": "zero", "top_k": 2},
    )


FAMILIES = {
    "shares": lambda rng, n: ml.stats.expert_share(routed(rng, n), bootstrap=QUICK),
    "importance": lambda rng, n: ml.stats.expert_importance(measured(rng, n), bootstrap=QUICK),
    "information": lambda rng, n: ml.stats.domain_information(
        routed(rng, n, sequences=pd.DataFrame({"domain": np.arange(n) % 2})), bootstrap=QUICK
    ),
}


@pytest.mark.parametrize("n_documents", [3, 8, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_effect_hardly_ever_a_cell_survives(family, n_documents):
    alarms = [FAMILIES[family](np.random.default_rng([n_documents, s]), n_documents) for s in range(60)]
    assert np.mean([bool(one["survives"].any()) for one in alarms]) <= 0.12  # 5 %, and two and a half standard errors


def test_an_effect_survives_and_only_there():
    found = ml.stats.expert_importance(measured(np.random.default_rng(0), 30, effect=2.0))
    assert found["survives"].sel(expert=0).all()
    assert found["survives"].sum() <= 4 + 2
    shares = ml.stats.expert_share(routed(np.random.default_rng(0), 30, SHARES))
    assert shares["survives"].sel(expert=[0, 1]).all()
    np.testing.assert_array_equal(shares["q"], ml.stats.adjusted(shares["p"].to_numpy()))


def test_each_measure_is_a_family_of_its_own():
    """All of `kept` differ from chance, which must not make the changes of shares look surer."""
    a = routed(np.random.default_rng(0), 20, slots=2)
    found = ml.stats.moved(a, a)
    assert not found["survives"].sel(measure="share_change").any()
    for measure in found["measure"].to_numpy():
        part = found.sel(measure=measure)
        np.testing.assert_array_equal(part["q"], ml.stats.adjusted(part["p"].to_numpy()))


@pytest.mark.parametrize("n", [4, 12, 40])
def test_p_of_a_t_interval_is_that_of_the_t_test(n):
    values = np.random.default_rng(n).normal(0.4, 1, n)
    low, high = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.9)
    expected = max(scipy_stats.ttest_1samp(values, 0.2).pvalue, 2.0 ** (1 - n))
    assert p_against(values.mean(), low, high, 0.2, n, 0.9) == pytest.approx(expected)
    skewed = [float(p_against(values.mean(), low, high, 0.2, n, 0.9, skew)) for skew in (-0.5, 0.5)]
    assert min(skewed) >= expected * (1 - 1e-9)


def test_few_documents_and_documents_that_do_not_differ_claim_nothing():
    assert p_against(1.0, 0.99, 1.01, 0.0, 3, 0.95) == 0.25  # 2^(1 - 3)
    assert p_against(1.0, 0.99, 1.01, 0.0, 1.1, 0.95) > 0.9  # one giant document
    assert np.isnan(p_against(1.0, 1.0, 1.0, 0.0, 9, 0.95))
    assert p_against(0.0, 0.0, 0.0, 0.0, 9, 0.95) == 1
    assert np.isnan(p_against(1.0, np.nan, np.nan, 0.0, 1, 0.95))


def test_simultaneous_intervals_hold_all_cells_at_once():
    settings = {"concentration": 60, "length": 80}
    held, alone = [], []
    for seed in range(40):
        trace = routed(np.random.default_rng([1, seed]), 24, SHARES, **settings)
        together = ml.stats.simultaneous(trace, ml.stats.expert_share)
        held.append(bool(((together.ci_low <= SHARES) & (together.ci_high >= SHARES)).all()))
        single = ml.stats.expert_share(trace)
        alone.append(bool(((single.ci_low <= SHARES) & (single.ci_high >= SHARES)).all()))
    assert np.mean(held) >= 0.87  # 95 %, less two and a half standard errors
    assert np.mean(alone) < 0.8  # which is why
    # No further than Bonferroni's: 24 cells, of which 8 of a layer add up to one.
    assert 2.5 < together.attrs["reach"] < scipy_stats.norm.isf(0.025 / 24) + 0.2
    assert together.attrs["simultaneous"] == 24


def test_simultaneous_intervals_reach_over_groups_too():
    trace = routed(np.random.default_rng(0), 24, sequences=pd.DataFrame({"domain": np.arange(24) % 3}))
    whole, by_domain = (ml.stats.simultaneous(trace, ml.stats.expert_share, by=by) for by in (None, "domain"))
    assert by_domain.attrs["reach"] > whole.attrs["reach"]
    assert by_domain.estimate.dims == ("domain", "layer", "expert")
