"""Routing statistics with intervals and sample sizes, computed on plain arrays and labelled with xarray."""

from mixlens.core.bootstrap import Bootstrap
from mixlens.stats.agreement import agreement
from mixlens.stats.contrast import contrast
from mixlens.stats.contributions import expert_contribution
from mixlens.stats.distances import domain_distance
from mixlens.stats.domains import domain_information, domain_specialization
from mixlens.stats.flips import flips, flips_by_margin
from mixlens.stats.importance import expert_importance
from mixlens.stats.likelihoods import likelihood_gap, routing_split
from mixlens.stats.moved import moved
from mixlens.stats.multiplicity import adjusted
from mixlens.stats.next_tokens import next_tokens
from mixlens.stats.null_models import null_model
from mixlens.stats.outputs import super_experts
from mixlens.stats.planning import plan, power
from mixlens.stats.pooling import partial_pooling
from mixlens.stats.published import table5
from mixlens.stats.routing import (
    expert_share,
    load_balance,
    load_entropy,
    position_profile,
    router_confidence,
    routing_entropy,
)
from mixlens.stats.saliency import saliency
from mixlens.stats.saturation import saturation
from mixlens.stats.simultaneous import simultaneous
from mixlens.stats.structure import coactivation, repetition, transitions
from mixlens.stats.together import compute
from mixlens.stats.tokens import predictability, vocabulary_specialization
from mixlens.stats.topk import topk_sweep
from mixlens.stats.weights import similarity_and_coactivation

__all__ = [
    "Bootstrap",
    "adjusted",
    "agreement",
    "coactivation",
    "compute",
    "contrast",
    "domain_distance",
    "domain_information",
    "domain_specialization",
    "expert_contribution",
    "expert_importance",
    "expert_share",
    "flips",
    "flips_by_margin",
    "likelihood_gap",
    "load_balance",
    "load_entropy",
    "moved",
    "next_tokens",
    "null_model",
    "partial_pooling",
    "plan",
    "position_profile",
    "power",
    "predictability",
    "repetition",
    "router_confidence",
    "routing_entropy",
    "routing_split",
    "saliency",
    "saturation",
    "similarity_and_coactivation",
    "simultaneous",
    "super_experts",
    "table5",
    "topk_sweep",
    "transitions",
    "vocabulary_specialization",
]
