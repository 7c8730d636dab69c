"""Plans against what more documents then give, and power against simulated contrasts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.clustered import SHARES, clustered
from helpers.refusals import refused
from scipy import stats as scipy_stats

import mixlens as ml
from mixlens.errors import BadInput


def routed(seed: int, n: int, shift: float = 0.0) -> ml.Trace:
    label = np.arange(n) % 2
    other = SHARES + shift * np.array([-1, 0, 0, 0, 0, 0, 0, 1])
    shares = np.stack([SHARES if even else other for even in label])
    ids, tokens, table = clustered(
        np.random.default_rng(seed), shares, n_documents=n, spread=0.3, concentration=40, n_layers=2,
        sequences=pd.DataFrame({"half": label}),
    )  # fmt: skip
    return ml.Trace.from_arrays(ids[..., None], n_experts=8, tokens=tokens, sequences=table)


def test_as_many_documents_as_planned_give_the_half_width():
    planned = ml.stats.plan(routed(0, 40), ml.stats.expert_share, half_width=0.02)
    widest = planned["documents"].max("expert")
    for layer, n in enumerate(widest.values):
        found = ml.stats.expert_share(routed(100 + layer, int(n)))
        assert float(((found.ci_high - found.ci_low) / 2).isel(layer=layer).max()) == pytest.approx(0.02, rel=0.35)
    assert planned.attrs["documents"] == float(widest.max())
    assert float((planned.tokens / planned.documents).mean()) == pytest.approx(60, rel=0.2)
    narrower = ml.stats.plan(routed(0, 40), ml.stats.expert_share, half_width=0.01)["documents"]
    assert (narrower > 3 * planned["documents"]).all()


def test_the_number_is_the_least_by_loops():
    data = xr.Dataset(
        {"estimate": ("layer", [0.5, 0.5]), "ci_low": ("layer", [0.3, 0.48]), "ci_high": ("layer", [0.7, 0.52])}
        | {name: ((), n) for name, n in {"n": 1000, "n_documents": 10, "n_effective": 10.0}.items()},
        attrs={"level": 0.95, "statistic": "made"},
    )
    found = ml.stats.plan(routed(0, 6), lambda trace, **_: data, half_width=0.1)
    spread = 0.2 * np.sqrt(10) / scipy_stats.t.isf(0.025, 9)
    least = next(n for n in range(2, 999) if scipy_stats.t.isf(0.025, n - 1) * spread / np.sqrt(n) <= 0.1)
    assert found.documents.values.tolist()[0] == least
    assert found.documents.values.tolist()[1] <= 4
    assert found.tokens.values[0] == 100 * least


def test_power_is_how_often_a_difference_then_survives():
    pilot = ml.stats.contrast(routed(1, 40, 0.08), ml.stats.expert_share, by="half", a=1)
    likely = ml.stats.power(pilot, documents=15, difference=0.08)["power"].sel(expert=0).mean()
    told = [
        ml.stats.contrast(routed(seed, 30, 0.08), ml.stats.expert_share, by="half", a=1).survives.sel(expert=0).values
        for seed in range(200, 225)
    ]
    assert float(likely) == pytest.approx(np.mean(told), abs=0.25)
    more = ml.stats.power(pilot, documents=60, difference=0.08)["power"].sel(expert=0)
    assert (more > 0.95).all()
    nothing = ml.stats.power(pilot, documents=60, difference=0.0)["power"]
    np.testing.assert_allclose(nothing, 0.05 / 16, rtol=1e-6)


def test_wrong_input():
    trace = routed(0, 6)
    with refused(BadInput, "half_width", 0):
        ml.stats.plan(trace, ml.stats.expert_share, half_width=0)
    with refused(BadInput, "statistic", "domain_information"):
        ml.stats.plan(trace, lambda t, **how: ml.stats.domain_information(t, by="half", **how), half_width=0.1)
    with refused(BadInput, "found"):
        ml.stats.power(ml.stats.expert_share(trace), documents=9)
    with refused(BadInput, "documents", 1):
        ml.stats.power(ml.stats.contrast(trace, ml.stats.expert_share, by="half"), documents=1)
