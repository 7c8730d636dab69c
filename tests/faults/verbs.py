"""Every verb that writes, on a model of a few thousand parameters: what it writes, and when two of it are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tiny import Letters, tiny_mixtral

import mixlens as ml

DOCUMENTS = [{"text": text, "domain": "ab"[i % 2]} for i, text in enumerate(["One two.", "Three four five.", "Six."])]
READING = ml.RecordSettings(progress=False, shard_tokens=12)
EVALUATING = ml.evals.EvalSettings(progress=False, routing=True, batch_size=2)
TIMING = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
# What a clock said.
_TIMES = {"created", "started", "checksums", "sha256", "machine", "reading", "date", "total_evaluation_time_seconds"}


@cache
def model() -> Any:
    return tiny_mixtral(num_hidden_layers=2)


@cache
def demo() -> Any:
    return ml.load("demo", verbose=False)


def record(out: Path) -> None:
    ml.record(model(), DOCUMENTS, tokenizer=Letters(), out=out, settings=READING, signals=["router_logits", "logprob"])


def save(out: Path) -> None:
    ml.record(model(), DOCUMENTS, tokenizer=Letters(), settings=READING).save(out)


def importance(out: Path) -> None:
    ablation = ml.experiments.Ablation(layers=[0])
    ml.experiments.measure_importance(
        model(), DOCUMENTS, ablation=ablation, tokenizer=Letters(), out=out, settings=READING
    )


def topk(out: Path) -> None:
    ml.experiments.measure_topk(model(), DOCUMENTS, ks=(1, 2), tokenizer=Letters(), out=out, settings=READING)


def contributions(out: Path) -> None:
    ml.experiments.measure_contributions(model(), DOCUMENTS, tokenizer=Letters(), out=out, settings=READING)


def impact(out: Path) -> None:
    ml.experiments.measure_impact(model(), model(), DOCUMENTS, tokenizer=Letters(), out=out, settings=READING)


def judge(out: Path) -> None:
    documents = [{**one, "text": f"{one['text']} {i}"} for i in range(4) for one in DOCUMENTS]
    said: Any = {"limits": {"loss": 0.1}, "tokenizer": Letters(), "settings": READING}
    ml.decisions.judge(model(), model(), documents=documents, out=out, **said)


def benchmark(out: Path) -> None:
    ml.benchmark(model(), requests=2, workload=ml.bench.Workload(16, 2), out=out, settings=TIMING)


def evaluate(out: Path) -> None:
    ml.evaluate(demo(), ["demo_0shot::brackets"], limit=2, out=out, settings=EVALUATING)


def pareto(out: Path) -> None:
    speed = ml.experiments.Speed(calls=1, prompt_tokens=16, output_tokens=2)
    texts = [one["text"] for one in DOCUMENTS]
    ml.experiments.measure_pareto("demo", texts, schemes=["bfloat16"], out=out, speed=speed, settings=READING)


def report(out: Path) -> None:
    ml.report(ml.record(model(), DOCUMENTS, tokenizer=Letters(), settings=READING), _older(out, "report.html"))


def figure(out: Path) -> None:
    trace = ml.record(model(), DOCUMENTS, tokenizer=Letters(), settings=READING)
    drawn: Any = ml.show.expert_share(ml.stats.expert_share(trace)).figure
    drawn.save(_older(out, "share.png"))


def _older(out: Path, name: str) -> Path:
    """A file in a folder, where an older one is already."""
    with suppress(OSError):
        out.mkdir(exist_ok=True)
        if not (out / name).exists():
            (out / name).write_text("an older file", "utf-8")
    return out / name


VERBS: Mapping[str, Callable[[Path], None]] = {
    "record": record,
    "Trace.save": save,
    "importance": importance,
    "topk": topk,
    "contributions": contributions,
    "impact": impact,
    "judge": judge,
    "benchmark": benchmark,
    "figure": figure,
    "report": report,
    "evaluate": evaluate,
    "pareto": pareto,
}
# Without those that take seconds.
QUICK = [name for name in VERBS if name not in ("report", "evaluate", "pareto")]
# Those that make a run; the others write a file.
RUNS = [name for name in VERBS if name not in ("figure", "report")]


def contents(folder: Path) -> dict[str, Any]:
    """Every file by name, without times: of a benchmark, what was asked and how it ended."""
    return {path.relative_to(folder).as_posix(): _content(path) for path in folder.rglob("*") if path.is_file()}


def _content(path: Path) -> Any:
    if path.name in ("meta.json", "lm_eval_results.json"):
        return _untimed(json.loads(path.read_bytes()), path)
    if path.name == "results.jsonl" and json.loads((path.parent / "meta.json").read_bytes())["kind"] == "bench":
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [(one["level"], one["index"], one["phase"], one["outcome"]) for one in records]
    if path.name in ("table.parquet", "pareto.png", "pareto.pdf"):  # of a comparison of schemes, with their speeds
        return None
    return path.read_bytes()


def _untimed(value: Any, path: Path) -> Any:
    """JSON without what a clock said, and without the sizes of files that hold what a clock said."""
    if isinstance(value, dict):
        return {
            key: sorted(one) if key == "files" else _untimed(one, path)
            for key, one in value.items()
            if key not in _TIMES
        }
    return [_untimed(one, path) for one in value] if isinstance(value, list) else value
