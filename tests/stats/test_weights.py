"""Similarity against co-activation, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from helpers.refusals import refused

from mixlens import BadInput
from mixlens.stats import similarity_and_coactivation

PAIR = ("layer", "expert", "expert_j")


def matrices(seed: int, tied: bool) -> tuple[xr.DataArray, xr.Dataset]:
    random = np.random.default_rng(seed)
    alike = random.normal(size=(2, 8, 8))
    alike = alike + alike.transpose(0, 2, 1)
    together = 0.1 + (0.02 * alike if tied else 0) + random.uniform(0, 0.05, (2, 8, 8))
    together[:, range(8), range(8)] = np.nan
    layer = {"layer": [3, 5]}
    return xr.DataArray(alike, layer, PAIR), xr.Dataset({"estimate": (PAIR, together)}, layer)


def test_correlation_over_pairs():
    alike, together = matrices(0, tied=True)
    found = similarity_and_coactivation(alike, together)
    for layer in (3, 5):
        a = alike.sel(layer=layer).values
        b = together.estimate.sel(layer=layer).values
        pairs = [(i, j) for i in range(8) for j in range(i + 1, 8)]
        r = np.corrcoef([a[i, j] for i, j in pairs], [(b[i, j] + b[j, i]) / 2 for i, j in pairs])[0, 1]
        assert float(found.r.sel(layer=layer)) == pytest.approx(r)
        assert float(found.p.sel(layer=layer)) < 0.01
        assert float(found.null_high.sel(layer=layer)) < r
    assert found.n.values.tolist() == [28, 28]


def test_p_is_uniform_where_there_is_nothing():
    p = np.concatenate(
        [similarity_and_coactivation(*matrices(s, tied=False), permutations=200).p.values for s in range(60)]
    )
    assert 0.35 < p.mean() < 0.65
    assert (p < 0.1).mean() < 0.2


def test_an_expert_nobody_chose_is_left_out():
    alike, together = matrices(0, tied=True)
    together.estimate.values[:, 2, :] = np.nan
    assert similarity_and_coactivation(alike, together).n.values.tolist() == [21, 21]


def test_other_layers_are_refused():
    alike, together = matrices(0, tied=True)
    with refused(BadInput, "layer", ([3], [3, 5])):
        similarity_and_coactivation(alike.sel(layer=[3]), together)
    with refused(BadInput, "dims", (("matrix", *PAIR), PAIR)):
        similarity_and_coactivation(alike.expand_dims(matrix=["w1"]), together)


def test_experts_that_are_all_alike_have_no_correlation():
    dims = ("layer", "expert", "expert_j")
    alike = xr.DataArray(np.ones((1, 4, 4)), {"layer": [0]}, dims)
    together = xr.Dataset({"estimate": (dims, np.random.default_rng(0).uniform(size=(1, 4, 4)))}, {"layer": [0]})
    found = similarity_and_coactivation(alike, together, permutations=20)
    assert all(np.isnan(found[name]).all() for name in ("r", "null_low", "null_high", "p"))
