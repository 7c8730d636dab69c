"""Every figure of a statistic, and every view, says what it takes when it is given something else."""

from __future__ import annotations

import pytest
import xarray as xr
from helpers.refusals import refused

from mixlens import evals, show
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
    with refused(BadInput, "data", "Trace"):
        draw(trace)
    with refused(BadInput, "data"):
        draw(xr.Dataset())
    if name in ("coactivation", "importance", "contributions", "topk_curve", "repetition"):
        with refused(BadInput, "data"):
            draw(share)


@pytest.mark.parametrize("name", ["coactivation", "expert_share", "share_heatmap", "transitions"])
def test_a_view_is_of_a_dataset_too(name, trace):
    for given in (trace, xr.Dataset()):
        with refused(BadInput, "data"):
            getattr(show.view, name)(given)


def test_figures_and_views_of_runs_say_of_which(trace, share):
    drawn = {
        "pareto": (show.pareto, show.view.pareto),
        "benchmark": (show.latency_cdf, show.latency_cdfs, show.token_timeline, show.throughput_latency_curve),
        "evaluate": (show.view.samples, show.scores, evals.score_table),
        "compare, of two evaluations,": (show.paired_differences,),
    }
    for given_by, draws in drawn.items():
        for draw in draws:
            for given in (trace, share, None):
                with pytest.raises(BadInput) as error:
                    draw(given)
                assert error.value.value == type(given).__name__
                assert f"ml.{given_by} " in str(error.value)


def test_a_text_is_of_a_trace(share):
    for draw in (show.text, show.view.tokens, show.view.strip):
        with refused(BadInput, "trace", "Dataset"):
            draw(share)


def test_facets_are_of_a_dimension_that_is_there(share):
    with refused(BadInput, "dim", "subject"):
        show.facet(show.share_heatmap, share, "subject")


def test_shares_that_nobody_measured_are_drawn_empty(share):
    nothing = share.where(False)
    assert nothing["estimate"].isnull().all()
    assert show.expert_share_grid(nothing.assign(n=share["n"], n_documents=share["n_documents"])).axes
