"""Live views: each takes what a statistic or a recording gave, and returns a View, one output of a notebook."""

from mixlens.show.view.base import View
from mixlens.show.view.matrices import coactivation, share_heatmap, transitions
from mixlens.show.view.plots import expert_share, latency, pareto
from mixlens.show.view.runs import diff, samples, strip
from mixlens.show.view.text import tokens

__all__ = [
    "View",
    "coactivation",
    "diff",
    "expert_share",
    "latency",
    "pareto",
    "samples",
    "share_heatmap",
    "strip",
    "tokens",
    "transitions",
]
