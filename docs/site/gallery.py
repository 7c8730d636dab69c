"""What the gallery shows: every figure and view, of the bundled model on its samples."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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


FIGURES: dict[str, Callable[[], Any]] = {
    "expert_share": lambda: ml.show.expert_share(ml.stats.expert_share(trace(), by="domain"), layer=3),
    "expert_share_grid": lambda: ml.show.expert_share_grid(ml.stats.expert_share(trace(), by="domain"), layers=[0, 3, 7]),
    "share_heatmap": lambda: ml.show.share_heatmap(ml.stats.expert_share(trace())),
    "specialization": lambda: ml.show.specialization(ml.stats.domain_specialization(trace()), layer=3),
    "coactivation": lambda: ml.show.coactivation(ml.stats.coactivation(trace()), layer=3),
    "transitions": lambda: ml.show.transitions(ml.stats.transitions(trace()), layer=0),
    "facet": lambda: ml.show.facet(ml.show.coactivation, ml.stats.coactivation(trace()).isel(layer=slice(0, 4)), "layer"),
    "repetition": lambda: ml.show.repetition(ml.stats.repetition(trace(), by="domain")),
    "routing_entropy": lambda: ml.show.routing_entropy(ml.stats.routing_entropy(trace())),
    "domain_information": lambda: ml.show.domain_information(ml.stats.domain_information(trace())),
    "by_layer": lambda: ml.show.by_layer(ml.stats.load_balance(trace())),
    "text": lambda: ml.show.text(trace(), sequence=0, layer=3),
    "expert_importance": lambda: ml.show.expert_importance(ml.stats.expert_importance(importance())),
    "importance_by_domain": lambda: ml.show.importance_by_domain(ml.stats.expert_importance(importance(), by="domain")),
    "importance_against_share": lambda: ml.show.importance_against_share(ml.stats.expert_importance(importance())),
    "expert_contribution": lambda: ml.show.expert_contribution(ml.stats.expert_contribution(contributions())),
    "contribution_by_domain": lambda: ml.show.contribution_by_domain(ml.stats.expert_contribution(contributions(), by="domain")),
    "contributions": lambda: ml.show.contributions(contributions(), sequence=0),
    "topk_sweep": lambda: ml.show.topk_sweep(ml.stats.topk_sweep(sweep())),
    "topk_routing": lambda: ml.show.topk_routing(ml.stats.topk_sweep(sweep())),
    "flips_by_layer": lambda: ml.show.flips_by_layer(ml.stats.flips(trace(), other())),
    "flips_by_margin": lambda: ml.show.flips_by_margin(ml.stats.flips_by_margin(trace(), other())),
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
    "tokens": lambda: ml.view.tokens(trace(), 0),
    "expert_share": lambda: ml.view.expert_share(ml.stats.expert_share(trace(), by="domain")),
    "share_heatmap": lambda: ml.view.share_heatmap(ml.stats.expert_share(trace(), by="domain")),
    "coactivation": lambda: ml.view.coactivation(ml.stats.coactivation(trace())),
    "transitions": lambda: ml.view.transitions(ml.stats.transitions(trace())),
    "diff": lambda: ml.view.diff(trace(), other(), 0, names=("float32", "hqq3")),
    "strip": lambda: ml.view.strip(trace(), 0),
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
