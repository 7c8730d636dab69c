"""judge: a model and a changed one on held-out text and benchmarks, against the user's limits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Difference
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.decisions.judgement import KIND, SCORE, TABLE, TEXT, Judgement, check_limits
from mixlens.decisions.verdict import DECISION, fewest_units
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.paired import compare_logs
from mixlens.evals.runner import SETTINGS as EVAL_SETTINGS
from mixlens.evals.runner import EvalSettings, evaluate
from mixlens.models.layout import config_of, moe_layers
from mixlens.models.provenance import describe, identity
from mixlens.recording.corpus import Corpus, RecordSettings, Shard, lengths_of, measure_documents, sum_documents
from mixlens.recording.logprobs import score
from mixlens.recording.reader import Reader
from mixlens.recording.recorder import PACKAGES
from mixlens.stats.measured import Measured, groups_of, summarised
from mixlens.trace.shards import parquet_bytes
from mixlens.trace.signals import parse_signals

SETTINGS = RecordSettings(shard_tokens=16_384)
_COLUMNS = ["kind", "group", "mean", "before", "after", "estimate", "ci_low", "ci_high", "p", "q", "n"]


def judge(
    before: nn.Module,
    after: nn.Module,
    suites: str | Sequence[str] | tuple[Log, Log] = (),
    documents: Iterable[Any] | None = None,
    *,
    limits: Mapping[str, float],
    by: str = "domain",
    out: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    bootstrap: Bootstrap = DECISION,
    settings: RecordSettings = SETTINGS,
    evaluation: EvalSettings = EVAL_SETTINGS,
) -> Judgement:
    """Judge a changed model by the worst that happened to it, on text and questions that nothing was fitted on.

    Both models read the same documents and answer the same questions. The verdict is "do it" where in every group of
    documents and in every subject what is lost is within the user's limits, at the end of the interval that is worse;
    "do not" where in one of them it is beyond them at the end that is better; else "not enough evidence". The intervals
    hold for all rows at once. Documents by which experts were chosen must not be among those of the gate.

    Parameters
    ----------
    before, after : torch.nn.Module
        The original and the changed model, with one vocabulary: pruned, quantized, or fine-tuned.
    suites : str or Sequence[str] or tuple[Log, Log], optional
        Benchmarks, protocols or suites as evaluate takes them; or evaluations of both models.
    documents : Iterable[Any], optional
        Held-out documents, as for record.
    limits : Mapping[str, float]
        How far in any group the "loss" may rise, in nats a token, and the "score" fall, as a fraction:
        ``{"loss": 0.05, "score": 0.02}``.
    by : str, optional
        Column of the documents that tells groups apart.
    out : str or os.PathLike, optional
        Run directory, with both evaluations in it; None keeps the result in memory.
    tokenizer : Any, optional
        None for the one that belongs to `before`.
    bootstrap : Bootstrap, optional
        Level of the intervals together.
    settings : RecordSettings, optional
        How documents are read.
    evaluation : EvalSettings, optional
        How the benchmarks are run.

    Returns
    -------
    Judgement

    Raises
    ------
    BadInput
        For a missing limit, neither documents nor suites, models of different vocabularies, documents without the
        column, and as record and evaluate.
    RunError
        If `out` holds something else.

    Examples
    --------
    >>> smaller = ml.decisions.prune(model, {layer: range(6) for layer in range(8)})
    >>> found = ml.decisions.judge(model, smaller, documents=documents, limits={"loss": 0.05}, settings=quiet)
    >>> found.verdict in ("do it", "do not", "not enough evidence")
    True
    """
    named = [suites] if isinstance(suites, str) else list(suites)
    logs = [one for one in named if isinstance(one, Log)]
    tasks = [one for one in named if isinstance(one, str)]
    kinds = [kind for kind, wanted in ((TEXT, documents is not None), (SCORE, logs or tasks)) if wanted]
    if not kinds:
        raise BadInput(
            "Cannot judge a model on nothing. Pass held-out documents=, benchmarks as suites=, or both.",
            argument="documents",
            value=None,
        )
    check_limits(limits, kinds)
    if len(sizes := {int(config_of(model).vocab_size) for model in (before, after)}) > 1:
        raise BadInput(
            f"Cannot judge models of different vocabularies ({sorted(sizes)}): they read the same text as different "
            "tokens. Pass a model and a changed copy of it.",
            argument="after",
            value=sorted(sizes),
        )
    corpus = None if documents is None else Corpus.of(before, documents, tokenizer, settings)
    plan = {
        "before": identity(before),
        "after": identity(after),
        "limits": dict(limits),
        "by": by,
        "level": bootstrap.level,
        "suites": [log.meta["tasks"] for log in logs] or tasks,
        "documents": None if corpus is None else corpus.plan(),
    }
    with nullcontext() if out is None else RunWriter(out, KIND, plan) as writer:
        if writer is not None and writer.complete:
            return Judgement.open(writer.path)
        measured = None if corpus is None else _measure(before, after, corpus)
        folders = {} if writer is None else {side: writer.path / side for side in ("before", "after")}
        if tasks:
            sides = {"before": before, "after": after}
            logs = [evaluate(model, tasks, out=folders.get(side), settings=evaluation) for side, model in sides.items()]
        table = table_of(measured, logs, by, bootstrap)
        meta = {
            "created": now(),
            "model": describe(after),
            **{side: plan[side] for side in ("before", "after")},
            "limits": dict(limits),
            "by": by,
            "level": bootstrap.level,
            "documents": 0 if corpus is None else corpus.documents.count,
            "versions": versions(*PACKAGES),
        }
        judgement = Judgement(table, limits, meta)
        if writer is None:
            return judgement
        meta |= {"verdict": judgement.verdict, "reason": judgement.reason}
        files = {TABLE: parquet_bytes(pa.Table.from_pandas(table, preserve_index=False))}
        writer.finish(meta, files, runs=list(folders.values()) if tasks else [])
        return replace(judgement, meta=meta, path=Path(writer.path))


def _measure(before: nn.Module, after: nn.Module, corpus: Corpus) -> Measured:
    """Losses of both models, summed over every document."""

    def measure(shard: Shard) -> dict[str, np.ndarray]:
        sequences, lengths = [piece.ids for piece in shard.pieces], lengths_of(shard)
        sums = {name: losses(model, sequences, corpus.batch_tokens) for name, model in sides.items()}
        sums |= {"tokens": lengths - 1, "length": lengths}
        return {name: sum_documents(shard, values) for name, values in sums.items()}

    sides = {"before": before, "after": after}
    return measure_documents(before, corpus, KIND, measure=measure, about={}, out=None)


@torch.no_grad()
def losses(model: nn.Module, sequences: list[np.ndarray], batch_tokens: int) -> np.ndarray:
    """Loss in nats of each sequence, summed over the tokens that have one before them [sequence]."""
    number = np.repeat(np.arange(len(sequences)), [len(ids) for ids in sequences])
    following = np.concatenate([np.append(ids[1:], -1) for ids in sequences])
    total = np.zeros(len(sequences))
    signals = parse_signals([], [layer.index for layer in moe_layers(model)])
    with Reader(model, signals, batch_tokens) as reader:
        for tokens, picked, _, states in reader.placed(sequences):
            target = following[tokens]
            head: Any = model.lm_head
            found = score(head, states[picked.to(states.device)], torch.from_numpy(target), top=False)["logprob"]
            np.subtract.at(total, number[tokens], np.where(target < 0, 0.0, found))
    return total


def table_of(measured: Measured | None, logs: list[Log], by: str, bootstrap: Bootstrap) -> pd.DataFrame:
    """All rows, with intervals that hold at once: each misses in as many cases as all may, over their number."""
    count = sum(len(rows) for rows in _rows(measured, logs, by, bootstrap))
    each = replace(bootstrap, level=1 - (1 - bootstrap.level) / count)
    table = pd.concat(_rows(measured, logs, by, each), ignore_index=True)[_COLUMNS]
    table.loc[table["n"] < fewest_units(each.level), ["ci_low", "ci_high"]] = np.nan
    return table


def _rows(measured: Measured | None, logs: list[Log], by: str, bootstrap: Bootstrap) -> list[pd.DataFrame]:
    found = []
    if measured is not None:
        rows = pd.DataFrame(_of_text(measured, by, bootstrap))
        found.append(rows.sort_values(["mean", "estimate"], ascending=[True, False], kind="stable"))
    if logs:
        rows = pd.DataFrame(_of_scores(logs, bootstrap))
        found.append(rows.sort_values(["mean", "estimate"], ascending=[True, True], kind="stable"))
    return found


def _of_text(measured: Measured, by: str, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    sums = measured.along_documents({name: ("document", array) for name, array in measured.arrays.items()}, {}, {})

    def change(parts: dict[str, np.ndarray]) -> Difference:
        return Difference(parts["after"] - parts["before"], parts["n"])

    rows = []
    for column in (by, None):
        data = summarised(sums, ("before", "after"), change, {}, column, bootstrap, null=0.0)
        labels, group = groups_of(sums, column)
        for number, name in enumerate(next(iter(labels.values()), ["all documents"])):
            cell = data.isel(dict.fromkeys(labels, number))
            own = sums.isel(document=group == number)
            with np.errstate(invalid="ignore"):
                means = {side: own[side].values.sum() / own.tokens.values.sum() for side in ("before", "after")}
            numbers = {name: float(cell[name]) for name in ("estimate", "ci_low", "ci_high", "p", "q")}
            about = {"kind": TEXT, "group": str(name), "mean": column is None, "n": int(cell.n_documents)}
            rows.append({**about, **means, **numbers})
    return rows


def _of_scores(logs: list[Log], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    table = compare_logs(*logs, bootstrap=bootstrap).table
    several = table["benchmark"].value_counts()
    return [
        {
            "kind": SCORE,
            "group": row["task"],
            "mean": bool(several[row["benchmark"]] > 1 and row["task"] not in logs[0].meta["tasks"]),
            "before": row["score_a"],
            "after": row["score_b"],
            "estimate": row["difference"],
            "p": row["p_value"],
            **{name: row[name] for name in ("ci_low", "ci_high", "q", "n")},
        }
        for row in table.to_dict("records")
    ]
