"""Figures of importance: every number drawn is the Dataset's, and missing is not zero."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from helpers import displayed as see
from helpers.refusals import refused

from mixlens import BadInput, show
from mixlens.plot.style import note_of


@pytest.fixture
def data() -> xr.Dataset:
    random = np.random.default_rng(0)
    estimate = random.normal(0, 0.1, (3, 4, 8))
    estimate[1, 2, 3] = np.nan
    dims = ("domain", "layer", "expert")
    share = random.dirichlet(np.ones(8), (3, 4))
    return xr.Dataset(
        {
            "estimate": (dims, estimate),
            "ci_low": (dims, estimate - 0.05),
            "ci_high": (dims, estimate + 0.05),
            "share": (dims, share),
            "value": ("domain", [3.0, 2.0, 1.0]),
            "n": ("domain", [100, 200, 300]),
            "n_documents": ("domain", [5, 6, 7]),
            "survives": (dims, random.random((3, 4, 8)) < 0.3),
        },
        coords={"domain": ["arxiv", "code", "$x$"], "layer": range(4), "expert": range(8)},
        attrs={
            "statistic": "expert_importance",
            "unit": "nats",
            "metric": "loss",
            "how": "reroute",
            "level": 0.95,
            "cells": 95,
        },
    )


def test_a_cell_is_the_change_and_marked_if_it_survives(data):
    one = data.sel(domain="code")
    ax = show.expert_importance(one)
    drawn = ax.collections[0].get_array().reshape(4, 8)
    np.testing.assert_array_equal(drawn.filled(np.nan), one.estimate)
    assert see.marked(ax) == set(map(tuple, np.argwhere(one.survives.values).tolist()))
    assert "200 tokens, 6 documents" in note_of(ax)
    assert "among 95 cells" in note_of(ax)
    assert "never chosen" in note_of(ax)
    assert ax.collections[0].norm(0) == 0.5


def test_domains_side_by_side(data):
    ax = show.importance_by_domain(data)
    drawn = ax.collections[0].get_array().reshape(3, 32)
    np.testing.assert_array_equal(drawn.filled(np.nan), data.estimate.values.reshape(3, 32))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["arxiv", "code", r"\$x\$"]


def test_importance_against_share(data):
    one = data.sel(domain="arxiv")
    ax = show.importance_against_share(one)
    for layer, line in enumerate(ax.lines[:4]):
        np.testing.assert_array_equal(line.get_xdata(), one.share.sel(layer=layer))
        np.testing.assert_array_equal(line.get_ydata(), one.estimate.sel(layer=layer))
    assert "nats" in ax.get_ylabel()
    other = show.importance_against_share(one.assign_attrs(unit="", metric="module.margin"))
    assert "margin" in other.get_ylabel()
    assert "nats" not in other.get_ylabel()


def test_topk_curve():
    dims = ("domain", "k")
    estimate = np.array([[3.0, 2.5, 2.6], [2.0, 1.5, 1.7]])
    data = xr.Dataset(
        {
            "estimate": (dims, estimate),
            "ci_low": (dims, estimate - 0.1),
            "ci_high": (dims, estimate + 0.1),
            "n": ("domain", [10, 20]),
            "n_documents": ("domain", [3, 4]),
        },
        coords={"domain": ["a", "b"], "k": [1, 2, 8]},
        attrs={"statistic": "topk_sweep", "unit": "nats", "own_k": 2, "level": 0.95},
    )
    ax = show.topk_sweep(data)
    for i, line in enumerate(ax.lines[:2]):
        np.testing.assert_array_equal(line.get_ydata(), estimate[i])
    assert ax.lines[2].get_xdata()[0] == 2


def test_a_domain_is_to_be_selected(data):
    with refused(BadInput, "data", ["domain"]):
        show.expert_importance(data)
    with refused(BadInput, "data", ["domain"]):
        show.importance_against_share(data)


def test_figures_are_saved_and_drawn_on_given_axes(data, tmp_path):
    show.importance_by_domain(data).save(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_contributions_along_a_text():
    logit = np.random.default_rng(0).normal(size=(7, 4, 2))
    logit[[3, 6]] = np.nan  # the ends of two sequences
    tokens = {
        "sequence": ("token", [0, 0, 0, 0, 1, 1, 1]),
        "position": ("token", [0, 1, 2, 3, 0, 1, 2]),
        "piece": ("token", ["a", " $b$", "\n", "c", "d", "e", "f"]),
    }
    data = xr.Dataset({"logit": (("token", "layer", "slot"), logit)}, {**tokens, "layer": range(4)})
    ax = show.contributions(data, positions=(1, 4))
    drawn = ax.collections[0].get_array().reshape(4, 3)
    np.testing.assert_allclose(drawn.filled(np.nan), logit[1:4].sum(-1).T)
    assert drawn.mask[:, 2].all()
    assert [label.get_text() for label in ax.get_xticklabels()] == [r" \$b\$", "↵", "c"]
    ax = show.contributions(data, sequence=1)
    np.testing.assert_allclose(ax.collections[0].get_array().reshape(4, 3)[:, :2], logit[4:6].sum(-1).T)
    with refused(BadInput, "sequence", 5):
        show.contributions(data, sequence=5)
