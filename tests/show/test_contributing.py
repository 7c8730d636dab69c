"""Figures of contributions and of the sweep over k: what is drawn is the Dataset's."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from helpers.refusals import refused

from mixlens import BadInput, show
from mixlens.plot.heatmap import signed_ticks, turning_point
from mixlens.plot.style import note_of


def contribution(measure: str, scale: float = 1.0) -> xr.Dataset:
    estimate = np.random.default_rng(0).normal(0.3 if measure == "norm" else 0, 0.05, (2, 4, 8))
    estimate[:, 0] *= scale
    dims = ("domain", "layer", "expert")
    return xr.Dataset(
        {
            "estimate": (dims, estimate),
            "ci_low": (dims, estimate - 0.03),
            "ci_high": (dims, estimate + 0.03),
            "n": (dims, np.full(estimate.shape, 7)),
            "n_documents": ("domain", [5, 6]),
        },
        coords={"domain": ["code", "$x$"], "layer": range(4), "expert": range(8)},
        attrs={"statistic": "expert_contribution", "measure": measure, "unit": "logits", "level": 0.95},
    )


@pytest.mark.parametrize("measure", ["logit", "norm"])
def test_cells_are_the_means(measure):
    data = contribution(measure)
    one = data.sel(domain="code")
    ax = show.expert_contribution(one)
    drawn = ax.collections[0].get_array().reshape(4, 8)
    np.testing.assert_array_equal(drawn.filled(np.nan), one.estimate)
    by_domain = show.contribution_by_domain(data).collections[0].get_array().reshape(2, 32)
    np.testing.assert_array_equal(by_domain.filled(np.nan), data.estimate.values.reshape(2, 32))
    with refused(BadInput, "data", ["domain"]):
        show.expert_contribution(data)


def test_a_few_large_numbers_do_not_hide_the_others():
    even, uneven = contribution("logit").sel(domain="code"), contribution("logit", 100).sel(domain="code")
    ax = show.expert_contribution(even)
    assert "logarithmic" not in note_of(ax)
    assert ax.collections[0].norm(0) == 0.5
    ax = show.expert_contribution(uneven)
    turn = turning_point(uneven.estimate.values)
    assert f"linear to ±{turn:g}, logarithmic beyond" in note_of(ax)
    norm = ax.collections[0].norm
    assert norm(0) == pytest.approx(0.5)
    assert abs(norm(np.median(np.abs(uneven.estimate))) - 0.5) > 0.05  # a linear scale gives it less than 0.01
    median = np.median(np.abs(uneven.estimate))
    assert turn <= median < 2 * turn


def test_ticks_of_a_signed_scale():
    assert signed_ticks(0.004, 2.0) == [-1.0, -0.1, -0.004, 0.0, 0.004, 0.1, 1.0]
    assert turning_point(np.zeros(4)) is None
    assert turning_point(np.full(4, np.nan)) is None


def test_routing_at_every_k():
    first = np.array([[1.0, 0.8, 0.6], [1.0, 0.7, 0.4]]).T
    data = xr.Dataset(
        {
            "estimate": ("k", [3.0, 2.5, 2.6]),
            "ci_low": ("k", [2.9, 2.4, 2.5]),
            "ci_high": ("k", [3.1, 2.6, 2.7]),
            "first_weight": (("k", "layer"), first),
            "n": 10,
            "n_documents": 3,
        },
        coords={"k": [1, 2, 8], "layer": [0, 1]},
        attrs={"statistic": "topk_sweep", "unit": "nats", "own_k": 2, "level": 0.95},
    )
    ax = show.topk_routing(data)
    for layer in (0, 1):
        np.testing.assert_array_equal(ax.lines[layer].get_ydata(), first[:, layer])
    np.testing.assert_allclose(ax.lines[2].get_ydata(), [1, 1 / 2, 1 / 8])
    assert ax.lines[3].get_xdata()[0] == 2
