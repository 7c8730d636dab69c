"""What the gallery shows: every figure and view, of the bundled model on its samples."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import mixlens as ml

SETTINGS = ml.RecordSettings(progress=False, max_length=96, overlong="truncate")
QUIET = ml.evals.EvalSettings(progress=False)
LOCAL = ml.bench.LocalSettings(progress=False, warmup=0)
FOLDER = Path(tempfile.mkdtemp(prefix="mixlens-gallery-"))


@cache
def model() -> Any:
    return ml.load("demo", verbose=False)


@cache
def rounded() -> Any:
    return ml.load("demo", quantization="hqq3-g32", verbose=False)


@cache
def documents(per_domain: int = 3) -> list[dict[str, str]]:
    kept: dict[str, list[dict[str, str]]] = {}
    for document in ml.demo_documents():
        kept.setdefault(document["domain"], []).append(document)
    return [document for of_domain in kept.values() for document in of_domain[:per_domain]]


@cache
def trace() -> Any:
    return ml.record(model(), documents(), signals=["router_logits", "logprob"], settings=SETTINGS)


@cache
def other() -> Any:
    return ml.record(rounded(), documents(), signals=["router_logits", "logprob"], settings=SETTINGS)


@cache
def importance() -> Any:
    ablation = ml.experiments.Ablation(layers=[0, 7])
    return ml.experiments.measure_importance(model(), documents(1), ablation=ablation, settings=SETTINGS)


@cache
def contributions() -> Any:
    return ml.experiments.measure_contributions(model(), documents(), settings=SETTINGS)


@cache
def sweep() -> Any:
    return ml.experiments.measure_topk(model(), documents(1), settings=SETTINGS)


@cache
def impact() -> Any:
    return ml.experiments.measure_impact(model(), rounded(), documents(1), settings=SETTINGS)


@cache
def schemes() -> Any:
    return ml.experiments.measure_pareto(
        "demo",
        documents(1),
        schemes=["bfloat16", "hqq4-g32", "hqq3-g32", "hqq2-g16"],
        out=FOLDER / "pareto",
        speed=ml.experiments.Speed(calls=0),
        settings=SETTINGS,
    )


@cache
def log() -> Any:
    return ml.evaluate(model(), ["demo"], limit=8, settings=QUIET)


@cache
def rounded_log() -> Any:
    return ml.evaluate(rounded(), ["demo"], limit=8, settings=QUIET)


@cache
def bench() -> Any:
    workload = ml.bench.Workload(64, 24)
    return ml.benchmark(model(), concurrency=(1, 2), requests=6, workload=workload, settings=LOCAL)


def candidates() -> list[ml.pricing.Candidate]:
    """Invented, to show the figure: the bundled model has no price."""
    rows = (("A", 70.6, 0.24, 90.0), ("B", 69.8, 0.15, 60.0), ("C", 66.0, 0.20, 140.0))
    return [
        ml.pricing.Candidate(
            f"provider {name} (invented)",
            (score, score - 0.7, score + 0.7),
            price,
            (speed, speed - 5, speed + 5),
            benchmark="an invented score",
        )
        for name, score, price, speed in rows
    ]


@cache
def generated(layers: int, experts: int, top_k: int, seed: int = 0) -> Any:
    """The demo's tokens with choices that are drawn: favourites by domain, layer and expert, to look at wide models."""
    real, random = trace(), np.random.default_rng(seed)
    number = real.read("sequence")
    domain = np.unique(real.sequences["domain"], return_inverse=True)[1][number]
    liking = random.normal(0, 0.7, (domain.max() + 1, layers, experts))
    logits = (liking[domain] + random.gumbel(size=(len(number), layers, experts))).astype(np.float32)
    chosen = np.argsort(-logits, -1)[..., :top_k]
    weight = np.exp(np.take_along_axis(logits, chosen, -1))
    made = ml.Trace.from_arrays(
        chosen,
        n_experts=experts,
        weight=weight / weight.sum(-1, keepdims=True),
        router_logits=logits,
        tokens={name: real.read(name) for name in ("sequence", "position", "token_id", "logprob")},
        sequences=real.sequences,
        meta={"model": {"name": f"generated, {layers} layers, {top_k} of {experts} experts"}},
    )
    made._vocabulary = real._vocabulary
    return made


def figures_of(trace: Callable[..., Any], other: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Every figure that takes nothing but traces; `other` is of the same tokens."""
    show, stats = ml.show, ml.stats
    return {
        "expert_share": lambda: show.expert_share(stats.expert_share(trace(), by="domain")),
        "expert_share_grid": lambda: show.expert_share_grid(stats.expert_share(trace(), by="domain")),
        "share_heatmap": lambda: show.share_heatmap(stats.expert_share(trace())),
        "specialization": lambda: show.specialization(stats.domain_specialization(trace())),
        "coactivation": lambda: show.coactivation(stats.coactivation(trace())),
        "transitions": lambda: show.transitions(stats.transitions(trace())),
        "facet": lambda: show.facet(show.coactivation, stats.coactivation(trace()).isel(layer=slice(0, 4)), "layer"),
        "contrast": lambda: show.contrast(stats.contrast(trace(), stats.expert_share, by="domain", a="github")),
        "repetition": lambda: show.repetition(stats.repetition(trace(), by="domain")),
        "routing_entropy": lambda: show.routing_entropy(stats.routing_entropy(trace())),
        "domain_information": lambda: show.domain_information(stats.domain_information(trace())),
        "by_layer": lambda: show.by_layer(stats.load_balance(trace())),
        "text": lambda: show.text(trace(), sequence=0),
        "flips_by_layer": lambda: show.flips_by_layer(stats.flips(trace(), other())),
        "flips_by_margin": lambda: show.flips_by_margin(stats.flips_by_margin(trace(), other())),
    }


def views_of(trace: Callable[..., Any], other: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Every view that takes nothing but traces; `other` is of the same tokens."""
    view, stats = ml.view, ml.stats
    return {
        "tokens": lambda: view.tokens(trace(), 0),
        "expert_share": lambda: view.expert_share(stats.expert_share(trace(), by="domain")),
        "share_heatmap": lambda: view.share_heatmap(stats.expert_share(trace(), by="domain")),
        "coactivation": lambda: view.coactivation(stats.coactivation(trace())),
        "transitions": lambda: view.transitions(stats.transitions(trace())),
        "diff": lambda: view.diff(trace(), other(), 0, names=("float32", "hqq3")),
        "strip": lambda: view.strip(trace(), 0),
    }


FIGURES: dict[str, Callable[[], Any]] = {
    **figures_of(trace, other),
    "expert_importance": lambda: ml.show.expert_importance(ml.stats.expert_importance(importance())),
    "importance_by_domain": lambda: ml.show.importance_by_domain(ml.stats.expert_importance(importance(), by="domain")),
    "importance_against_share": lambda: ml.show.importance_against_share(ml.stats.expert_importance(importance())),
    "expert_contribution": lambda: ml.show.expert_contribution(ml.stats.expert_contribution(contributions())),
    "contribution_by_domain": lambda: ml.show.contribution_by_domain(ml.stats.expert_contribution(contributions(), by="domain")),
    "contributions": lambda: ml.show.contributions(contributions(), sequence=0),
    "topk_sweep": lambda: ml.show.topk_sweep(ml.stats.topk_sweep(sweep())),
    "topk_routing": lambda: ml.show.topk_routing(ml.stats.topk_sweep(sweep())),
    "quality_split": lambda: ml.show.quality_split(impact().split()),
    "expert_errors": lambda: ml.show.expert_errors(impact().experts()),
    "pareto": lambda: ml.show.pareto(schemes()),
    "scores": lambda: ml.show.scores({"float32": log(), "hqq3": rounded_log()}),
    "paired_differences": lambda: ml.show.paired_differences(ml.compare(log(), rounded_log())),
    "latency_cdf": lambda: ml.show.latency_cdf(bench()),
    "latency_cdfs": lambda: ml.show.latency_cdfs(bench()),
    "throughput_latency_curve": lambda: ml.show.throughput_latency_curve(bench()),
    "token_timeline": lambda: ml.show.token_timeline(bench()),
    "roofline": lambda: ml.show.roofline(bench()),
    "quality_cost_speed": lambda: ml.show.quality_cost_speed(candidates()),
}  # fmt: skip
VIEWS: dict[str, Callable[[], Any]] = {
    **views_of(trace, other),
    "samples": lambda: ml.view.samples(log()),
    "latency": lambda: ml.view.latency(bench()),
    "pareto": lambda: ml.view.pareto(schemes()),
}


def drawn(name: str) -> bytes:
    """The SVG of a figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = FIGURES[name]()
    figure = made if hasattr(made, "svg") else made.get_figure(root=True)
    return figure.svg()


def live(name: str) -> str:
    """The page of a view."""
    return VIEWS[name]().to_html()


def caption_of(name: str, door: str = "show") -> str:
    """The first paragraph of the docstring."""
    return (inspect.getdoc(getattr(getattr(ml, door), name)) or "").split("\n\n")[0]
