"""Figures of routing statistics: each takes a Dataset and `ax=`, and returns the Axes; grids return a Figure."""

import warnings
from typing import Any

from mixlens import view
from mixlens.bench.figures import (
    latency_cdf,
    latency_cdfs,
    throughput_latency_curve,
    token_timeline,
)
from mixlens.bench.roofline_figure import roofline
from mixlens.evals.figures import paired_differences, scores
from mixlens.plot import tables
from mixlens.plot.bars import expert_share, expert_share_grid
from mixlens.plot.comparison import expert_errors, flips_by_layer, flips_by_margin, pareto, quality_split
from mixlens.plot.contrast import contrast
from mixlens.plot.contributions import (
    contribution_by_domain,
    contributions,
    expert_contribution,
    topk_routing,
    topk_sweep,
)
from mixlens.plot.importance import expert_importance, importance_against_share, importance_by_domain
from mixlens.plot.lines import by_layer, domain_information, repetition, routing_entropy
from mixlens.plot.matrices import coactivation, facet, share_heatmap, specialization, transitions
from mixlens.plot.text import text
from mixlens.pricing.figures import quality_cost_speed

__all__ = [
    "by_layer",
    "coactivation",
    "contrast",
    "contribution_by_domain",
    "contributions",
    "domain_information",
    "expert_contribution",
    "expert_errors",
    "expert_importance",
    "expert_share",
    "expert_share_grid",
    "facet",
    "flips_by_layer",
    "flips_by_margin",
    "importance_against_share",
    "importance_by_domain",
    "latency_cdf",
    "latency_cdfs",
    "paired_differences",
    "pareto",
    "quality_cost_speed",
    "quality_split",
    "repetition",
    "roofline",
    "routing_entropy",
    "scores",
    "share_heatmap",
    "specialization",
    "tables",
    "text",
    "throughput_latency_curve",
    "token_timeline",
    "topk_routing",
    "topk_sweep",
    "transitions",
    "view",
]

# Names used before 0.1, by current name. They keep working for one release.
_MOVED = {
    "contribution": "expert_contribution",
    "entropy": "routing_entropy",
    "importance": "expert_importance",
    "information": "domain_information",
    "topk_curve": "topk_sweep",
}


def __getattr__(name: str) -> Any:
    if name == "score_table":
        from mixlens.evals.figures import score_table as found

        now = "ml.evals.score_table"
    elif name in _MOVED:
        found, now = globals()[_MOVED[name]], f"ml.show.{_MOVED[name]}"
    else:
        raise AttributeError(f"module 'mixlens.show' has no attribute {name!r}; it has {', '.join(__all__)}")
    text = f"ml.show.{name} is deprecated and goes with mixlens 0.2; use {now}."
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return found
