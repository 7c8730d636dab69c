"""Live views: each takes a statistic or a recording and returns a View, one output of a notebook."""

from mixlens.bench.live import latency
from mixlens.evals.live import samples
from mixlens.live.matrices import coactivation, share_heatmap, transitions
from mixlens.live.plots import expert_share, pareto
from mixlens.live.tokens import tokens
from mixlens.live.tokens_pair import diff, strip
from mixlens.live.view import View

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
