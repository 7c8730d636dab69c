"""Figures of routing statistics: each takes a Dataset and `ax=`, and returns the Axes; grids return a Figure."""

from mixlens.show import tables, view
from mixlens.show.comparison import expert_errors, flips_by_layer, flips_by_margin, pareto, quality_split
from mixlens.show.contributing import (
    contribution,
    contribution_by_domain,
    contributions,
    topk_curve,
    topk_routing,
)
from mixlens.show.figures import by_layer, entropy, expert_share, expert_share_grid, information, repetition
from mixlens.show.maps import importance, importance_against_share, importance_by_domain
from mixlens.show.matrices import coactivation, facet, share_heatmap, specialization, transitions
from mixlens.show.passage import text
from mixlens.show.roofline import roofline
from mixlens.show.score_figures import paired_differences, score_table, scores
from mixlens.show.speed import latency_cdf, latency_cdfs, quality_cost_speed, throughput_latency_curve, token_timeline

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
