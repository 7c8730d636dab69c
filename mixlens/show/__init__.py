"""Figures of routing statistics: each takes a Dataset and `ax=`, and returns the Axes; grids return a Figure."""

from mixlens.show import view
from mixlens.show.figures import by_layer, entropy, expert_share, expert_share_grid, information, repetition
from mixlens.show.maps import contributions, importance, importance_against_share, importance_by_domain, topk_curve
from mixlens.show.matrices import coactivation, facet, share_heatmap, specialization, transitions
from mixlens.show.passage import text

__all__ = [
    "by_layer",
    "coactivation",
    "contributions",
    "entropy",
    "expert_share",
    "expert_share_grid",
    "facet",
    "importance",
    "importance_against_share",
    "importance_by_domain",
    "information",
    "repetition",
    "share_heatmap",
    "specialization",
    "text",
    "topk_curve",
    "transitions",
    "view",
]
