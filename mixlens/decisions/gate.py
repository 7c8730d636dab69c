"""judge: compare a model with a changed copy on held-out text and benchmarks, against given limits."""

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
from torch import nn

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.decisions.verdict import DECISION, groups_compared
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.paired import compare_logs
from mixlens.evals.runner import SETTINGS as EVAL_SETTINGS
from mixlens.evals.runner import EvalSettings, evaluate
from mixlens.evals.scoring import tasks_by_protocol
from mixlens.models.layout import config_of, n_experts
from mixlens.models.provenance import describe, identity
from mixlens.recording.corpus import Corpus, RecordSettings, tokenizer_of
from mixlens.recording.record import record
from mixlens.recording.recorder import PACKAGES
from mixlens.stats.judgement import KIND, SCORE, TABLE, TEXT, Judgement, check_limits
from mixlens.stats.next_tokens import next_tokens
from mixlens.stats.verdicts import fewest_units, level_of_each
from mixlens.trace.shards import parquet_bytes
from mixlens.trace.trace import Trace

SETTINGS = RecordSettings()


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
    """Judge a changed model by its worst losses, on text and questions on which nothing was fitted.

    Both models read the same documents and answer the same questions. The verdict is "do it" if in every group of
    documents and every subject the loss is within the limits at the worse end of its interval; "do not" if in any of
    them it exceeds the limits at the better end; otherwise "not enough evidence". The intervals hold simultaneously for
    all rows. Documents used to choose experts must not be among those of the gate.

    Parameters
    ----------
    before, after : torch.nn.Module
        The original and the changed model (pruned, quantized, or fine-tuned), with the same vocabulary.
    suites : str or Sequence[str] or tuple[Log, Log], optional
        Benchmarks, protocols or suites as in evaluate; or a pair of evaluations of the two models.
    documents : Iterable[Any], optional
        Held-out documents, as for record.
    limits : Mapping[str, float]
        Maximum rise of the "loss" in any group, in nats per token, and maximum fall of the "score", as a fraction:
        ``{"loss": 0.05, "score": 0.02}``.
    by : str, optional
        Column of the documents that defines groups.
    out : str or os.PathLike, optional
        Run directory, including both evaluations; None keeps the result in memory.
    tokenizer : Any, optional
        Tokenizer; None for that of `before`.
    bootstrap : Bootstrap, optional
        Simultaneous level of the intervals.
    settings, evaluation
        As for record, and for evaluate.

    Returns
    -------
    Judgement

    Raises
    ------
    BadInput
        If a limit is missing, there are neither documents nor suites, vocabularies differ, documents lack the column,
        and as for record and evaluate.
    RunError
        If `out` holds another run.

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
            "Cannot judge a model: there are no documents and no benchmarks. Pass documents=, suites=, or both.",
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
    read, texts = None, None
    if documents is not None:
        texts = documents if isinstance(documents, str) else list(documents)
        if not all(isinstance(one, Mapping) and one.get(by) is not None for one in texts):
            raise BadInput(
                f"Cannot judge by {by!r}: some documents have no {by}. Pass by= with a column that all have.",
                argument="by",
                value=by,
            )
        tokenizer = tokenizer_of(before) if tokenizer is None else tokenizer
        read = Corpus.of(before, texts, tokenizer, settings).plan()
    plan = {
        **{side: identity(one) | {"experts": n_experts(one)} for side, one in (("before", before), ("after", after))},
        "limits": dict(limits),
        "by": by,
        "level": bootstrap.level,
        "suites": [log.meta["tasks"] for log in logs] or tasks,
        "documents": read,
    }
    with nullcontext() if out is None else RunWriter(out, KIND, plan) as writer:
        if writer is not None and writer.complete:
            return Judgement.open(writer.path)
        sides = {"before": before, "after": after}
        folders = {} if writer is None else {side: writer.path / side for side in sides}
        pair = None
        if texts is not None:
            options = {"signals": ["logprob"], "tokenizer": tokenizer, "settings": settings}
            with groups_compared():
                pair = record(before, texts, **options), record(after, texts, **options)
        if tasks:
            logs = [evaluate(model, tasks, out=folders.get(side), settings=evaluation) for side, model in sides.items()]
        table = table_of(pair, logs, by, bootstrap)
        meta = {"created": now(), "model": describe(after), **plan, "versions": versions(*PACKAGES)}
        judgement = Judgement(table, limits, meta)
        if writer is None:
            return judgement
        meta |= {"verdict": judgement.verdict, "reason": judgement.reason}
        files = {TABLE: parquet_bytes(pa.Table.from_pandas(table, preserve_index=False))}
        writer.finish(meta, files, runs=list(folders.values()) if tasks else [])
        return replace(judgement, meta=meta, path=Path(writer.path))


def table_of(pair: tuple[Trace, Trace] | None, logs: Sequence[Log], by: str, bootstrap: Bootstrap) -> pd.DataFrame:
    """Return all rows of a judgement, the worst of each kind first, with simultaneous intervals."""
    parts = []
    if pair is not None:
        groups = pair[0].sequences[by].nunique() if by in pair[0].sequences else 0  # next_tokens refuses it
        parts.append((groups + 1, lambda each: _of_text(pair, by, each), False))
    if logs:
        about, other = (log.meta["tasks"] for log in logs)
        several = tasks_by_protocol({name: about[name] for name in about if name in other}).values()
        rows = sum(len(names) + (len(names) > 1) for names in several)
        parts.append((rows, lambda each: _of_scores(logs, each), True))
    each = replace(bootstrap, level=level_of_each(bootstrap.level, max(1, sum(rows for rows, _, _ in parts))))
    sorted_ = [
        pd.DataFrame(rows_of(each)).sort_values(["mean", "estimate"], ascending=[True, falls], kind="stable")
        for _, rows_of, falls in parts
    ]
    table = pd.concat(sorted_, ignore_index=True)
    table.loc[table["n"] < fewest_units(each.level), ["ci_low", "ci_high"]] = np.nan
    return table


def _of_text(pair: tuple[Trace, Trace], by: str, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    rows = []
    for column in (by, None):
        data = next_tokens(*pair, by=column, bootstrap=bootstrap)
        data = data if column is not None else data.expand_dims(group=["all documents"])
        [group] = {*data["estimate"].dims} - {"measure"}
        for number, name in enumerate(data[group].values):
            cell = data.isel({group: number})
            loss = {
                side: float(cell["estimate"].sel(measure=f"loss_{at}"))
                for side, at in (("before", "a"), ("after", "b"))
            }
            change = cell.sel(measure="loss_difference")
            numbers = {name: float(change[name]) for name in ("estimate", "ci_low", "ci_high")}
            about = {"kind": TEXT, "group": str(name), "mean": column is None, "n": int(cell["n_documents"])}
            rows.append({**about, **loss, **numbers})
    return rows


def _of_scores(logs: Sequence[Log], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    table = compare_logs(*logs, bootstrap=bootstrap).table
    several = table["benchmark"].value_counts()
    names = {"score_a": "before", "score_b": "after", "difference": "estimate"}
    return [
        {
            "kind": SCORE,
            "group": row["task"],
            "mean": bool(several[row["benchmark"]] > 1 and row["task"] not in logs[0].meta["tasks"]),
            **{own: row[name] for name, own in names.items()},
            **{name: row[name] for name in ("ci_low", "ci_high", "n")},
        }
        for row in table.to_dict("records")
    ]
