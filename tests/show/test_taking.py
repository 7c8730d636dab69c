"""Every figure of a statistic, and every view, says what it takes when it is given something else."""

from __future__ import annotations

import pytest
import xarray as xr

from mixlens import show
from mixlens.errors import BadInput

FIGURES = [
    "by_layer",
    "coactivation",
    "contribution",
    "contribution_by_domain",
    "contributions",
    "entropy",
    "expert_errors",
    "expert_share",
    "expert_share_grid",
    "flips_by_layer",
    "flips_by_margin",
    "importance",
    "importance_against_share",
    "importance_by_domain",
    "information",
    "quality_split",
    "repetition",
    "share_heatmap",
    "specialization",
    "topk_curve",
    "topk_routing",
    "transitions",
]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_of_a_dataset_and_says_which(name, trace, share):
    draw = getattr(show, name)
    with pytest.raises(BadInput, match=rf"^{name} was to be drawn. A Trace was given. Give what ml\.\w"):
        draw(trace)
    with pytest.raises(BadInput, match=rf"^{name} was to be drawn. A Dataset without .* was given. Give what ml\.\w"):
        draw(xr.Dataset())
    if name in ("coactivation", "importance", "contributions", "topk_curve", "repetition"):
        with pytest.raises(BadInput, match="A Dataset without"):
            draw(share)


@pytest.mark.parametrize("name", ["coactivation", "expert_share", "share_heatmap", "transitions"])
def test_a_view_is_of_a_dataset_too(name, trace):
    for given in (trace, xr.Dataset()):
        with pytest.raises(BadInput, match=rf"^{name} was to be drawn. A .* was given. Give what ml.stats"):
            getattr(show.view, name)(given)


def test_figures_and_views_of_runs_say_of_which(trace, share):
    drawn = {
        "pareto": (show.pareto, show.view.pareto),
        "benchmark": (show.latency_cdf, show.latency_cdfs, show.token_timeline, show.throughput_latency_curve),
        "evaluate": (show.view.samples, show.scores, show.score_table),
        "compare, of two evaluations,": (show.paired_differences,),
    }
    for given_by, draws in drawn.items():
        for draw in draws:
            for given in (trace, share, None):
                with pytest.raises(
                    BadInput, match=rf"A {type(given).__name__} was given. Give what ml.{given_by} gives"
                ):
                    draw(given)


def test_a_text_is_of_a_trace(share):
    for draw in (show.text, show.view.tokens, show.view.strip):
        with pytest.raises(BadInput, match="A text was to be shown with its routing. A Dataset was given."):
            draw(share)


def test_facets_are_of_a_dimension_that_is_there(share):
    with pytest.raises(BadInput, match="One panel for every 'subject' was to be drawn. The data has domain, layer"):
        show.facet(show.share_heatmap, share, "subject")


def test_shares_that_nobody_measured_are_drawn_empty(share):
    nothing = share.where(False)
    assert nothing["estimate"].isnull().all()
    assert show.expert_share_grid(nothing.assign(n=share["n"], n_documents=share["n_documents"])).axes
