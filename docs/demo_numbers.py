"""The table of numbers.md: what every verb says about the bundled model; `python docs/demo_numbers.py` prints it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import xarray as xr

import mixlens as ml
from mixlens.core.text import interval

QUIET = ml.RecordSettings(progress=False)
SHORT = ml.RecordSettings(progress=False, max_length=64, overlong="truncate")


def measured(cell: xr.Dataset, decimals: int, unit: str, *, factor: float = 1.0) -> str:
    """An estimate with its interval."""
    estimate, low, high = (float(cell[name]) for name in ("estimate", "ci_low", "ci_high"))
    return f"{interval(estimate, low, high, decimals, factor=factor)}{unit}"


def rows(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Page, question, answer and n."""
    documents = ml.demo_documents()
    model = ml.load("demo", verbose=False)
    size = ml.audit(model).summary()
    yield "load", "How large is it?", f"{size['weights']:,} weights, {size['bytes'] / 1e6:.1f} MB in float32", ""

    trace = ml.record(model, documents, out=folder / "trace", settings=QUIET)
    on_disk = sum(file.stat().st_size for file in (folder / "trace").iterdir())
    tokens = f"{trace.n_tokens:,} tokens of {len(documents)} documents"
    yield "record", "How large is a recording?", f"{on_disk / trace.n_tokens:.0f} bytes per token on disk", tokens

    repetition = ml.stats.repetition(trace).sel(choice="first", layer=int(trace.layers[-1]))
    answer = measured(repetition, 1, " % of first choices; 12.5 % if independent", factor=100)
    yield "statistics", "How often do two consecutive tokens share an expert in the last layer?", answer, tokens
    balance = ml.stats.load_balance(trace).sel(measure="cv")
    uneven = balance.isel(layer=int(balance["estimate"].argmax("layer")))
    answer = f"layer {int(uneven['layer'])}, coefficient of variation {measured(uneven, 2, '')}"
    yield "statistics", "Which layer is the least balanced?", answer, tokens
    information = ml.stats.domain_information(trace).sel(measure="excess")
    answer = f"in {int(information['survives'].sum())} of {information.sizes['layer']} layers"
    yield "statistics", "Where does routing depend on the domain?", answer, tokens

    ablation = ml.experiments.Ablation(layers=[7])
    loss = ml.stats.expert_importance(
        ml.experiments.measure_importance(model, documents[::2], ablation=ablation, settings=SHORT)
    ).sel(layer=7)
    most = loss.isel(expert=int(loss["estimate"].argmax("expert")))
    answer = f"expert {int(most['expert'])}: loss up by {measured(most, 3, ' nats per token')}"
    yield "edit", "Which expert of the last layer matters most?", answer, f"{int(most.n):,} tokens of 30 documents"

    schemes = ml.experiments.measure_pareto(
        "demo",
        documents[::2],
        schemes=["nf4", "hqq2-g32"],
        out=folder / "schemes",
        settings=SHORT,
        speed=ml.experiments.Speed(calls=0),
    )
    small = ml.load("demo", quantization="nf4", verbose=False)
    yield "quantize", "How large is it in nf4?", f"{ml.audit(small).bytes / 1e6:.1f} MB, scales included", ""
    impact = ml.experiments.measure_impact(model, small, documents[::2], settings=SHORT).quality()
    tokens_read = f"{int(impact.n):,} tokens of 30 documents"
    answer = f"loss changes by {measured(impact.sel(measure='loss_difference'), 4, ' nats per token')}"
    yield "quantize", "What does nf4 cost?", answer, tokens_read
    answer = f"KL divergence {measured(impact.sel(measure='kl'), 4, ' nats per token')}"
    yield "quantize", "How far does nf4 move the predictions?", answer, tokens_read

    log = ml.evaluate(model, ["demo"], limit=20, settings=ml.evals.EvalSettings(progress=False))
    score = log.scores[log.scores["average"] == "micro"].iloc[0]
    answer = f"{interval(score['score'], score['ci_low'], score['ci_high'], 1, factor=100)} %"
    yield "evaluate", "What does it score on its own benchmark?", answer, f"{score['n']} samples"

    decision = ml.decide([schemes], at_most={"kl": 0.05, "weight_bytes": "10MB"})
    answer = f"{decision.recommended}, of float32, nf4 and hqq2-g32"
    yield "decide", "Which scheme keeps to 10 MB and a KL divergence of 0.05?", answer, tokens_read

    distinct = ml.decisions.distinct_experts(trace, batch=8).mean("layer")
    answer = f"{float(distinct['estimate']):.1f} of 8 per layer, on average"
    yield "decisions", "How many experts does a decoding step of 8 sequences read?", answer, tokens


def table() -> str:
    """The rows as Markdown."""
    lines = ["| page | question | answer for the bundled model | n |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        lines += [f"| [{page}]({page}.md) | {' | '.join(cells)} |" for page, *cells in rows(Path(folder))]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
