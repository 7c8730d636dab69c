"""Figures of routing statistics: each takes a Dataset and `ax=`, and returns the Axes; grids return a Figure."""

from mixlens import view
from mixlens.bench.figures import (
    latency_cdf,
    latency_cdfs,
    throughput_latency_curve,
    token_timeline,
)
from mixlens.bench.roofline_figure import roofline
from mixlens.evals.figures import paired_differences, score_table, scores
from mixlens.plot import tables
from mixlens.plot.bars_and_lines import by_layer, entropy, expert_share, expert_share_grid, information, repetition
from mixlens.plot.comparison import expert_errors, flips_by_layer, flips_by_margin, pareto, quality_split
from mixlens.plot.contributions import (
    contribution,
    contribution_by_domain,
    contributions,
    topk_curve,
    topk_routing,
)
from mixlens.plot.importance import importance, importance_against_share, importance_by_domain
from mixlens.plot.matrices import coactivation, facet, share_heatmap, specialization, transitions
from mixlens.plot.text import text
from mixlens.pricing.figures import quality_cost_speed

__all__ = [
    "by_layer",
    "coactivation",
    "contribution",
    "contribution_by_domain",
    "contributions",
    "entropy",
    "expert_errors",
    "expert_share",
    "expert_share_grid",
    "facet",
    "flips_by_layer",
    "flips_by_margin",
    "importance",
    "importance_against_share",
    "importance_by_domain",
    "information",
    "latency_cdf",
    "latency_cdfs",
    "paired_differences",
    "pareto",
    "quality_cost_speed",
    "quality_split",
    "repetition",
    "roofline",
    "score_table",
    "scores",
    "share_heatmap",
    "specialization",
    "tables",
    "text",
    "throughput_latency_curve",
    "token_timeline",
    "topk_curve",
    "topk_routing",
    "transitions",
    "view",
]
