"""Routing of the samples of an evaluation, recorded batch by batch and joined by sample."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.run_dir import RunWriter
from mixlens.engines.check import combined
from mixlens.errors import BadInput, MissingSignal
from mixlens.evals.log import ROUTING, Log
from mixlens.stats.agreement import agreement
from mixlens.stats.routing import expert_share
from mixlens.trace.trace import Trace, concat


class SampleRecorder:
    """Recorder of the routing of a model while it answers, batch by batch, so that a resumed run has all of it.

    backend  backend whose `recording` keeps the routing of the answers in a block, one sequence per row
    writer   writer of the evaluation; None keeps the routing in memory

    Raises BadInput if the routing of the backend is not accessible, and ModelError if the model has no experts.
    """

    def __init__(self, backend: Any, writer: RunWriter | None) -> None:
        if not hasattr(backend, "recording"):
            raise BadInput(
                "Cannot record the routing of the samples: this model runs elsewhere, and its routing is not "
                "accessible. Evaluate a loaded model (ml.load), an engine (ml.engines.vllm), or a server that returns "
                "routing (ml.Endpoint(..., routing=True)), or leave out routing.",
                argument="routing",
            )
        self.backend, self.writer = backend, writer
        self._parts: dict[str, Trace] = {}

    def answer(self, name: str, ask: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers of `ask`, and keep their routing under the name of the batch."""
        with self.backend.recording() as recorded:
            answers = ask()
        trace = recorded()
        if self.writer is not None:
            shutil.rmtree(self._place(name), ignore_errors=True)  # left by a process that was killed while answering
            trace = trace.save(self._place(name))
        self._parts[name] = trace
        return answers

    def finish(self, names: Sequence[str], records: Sequence[dict[str, Any]], tasks: dict[str, Any]) -> Trace:
        """Join all batches in order to one trace with the outcomes of its samples; save it if there is a folder."""
        parts = [self._parts.get(name) or Trace.open(self._place(name)) for name in names]
        whole = concat(parts)
        whole._vocabulary = self.backend.vocabulary()
        # A resumed run reads its shots again.
        again = (whole.sequences["role"] == "shots") & whole.sequences.duplicated(["role", "task"])
        trace = whole.select(where=~again)
        trace.sequences = with_samples(trace.sequences, records, tasks)
        if checks := [part.meta["source_check"] for part in parts if "source_check" in part.meta]:
            trace.meta["source_check"] = combined(checks)
        if self.writer is None:
            return trace
        folder = self.writer.path / ROUTING
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed while saving
        return trace.save(folder)

    def _place(self, name: str) -> Path:
        assert self.writer is not None
        return self.writer.work / ROUTING / name.replace(":", "-")


def with_samples(
    sequences: pd.DataFrame, records: Sequence[dict[str, Any]], tasks: dict[str, dict[str, Any]]
) -> pd.DataFrame:
    """Add the outcomes of their samples to sequences.

    The columns are benchmark; group (subject or language); outcome ("right", "wrong", "partly", "unscored", "shots");
    document_id, one for all rows of a sample, which the bootstrap resamples; and counted, True for the row that
    represents its sample: the only one, or that of the gold answer if every choice has a row.
    """
    samples = {(record["task"], record["sample_id"]): record for record in records}
    columns: dict[str, list[Any]] = {name: [] for name in ("benchmark", "group", "outcome", "document_id", "counted")}
    for row in sequences.to_dict("records"):
        sample = samples.get((row["task"], row["sample_id"]), {})
        columns["benchmark"].append(tasks[row["task"]]["benchmark"])
        columns["group"].append(sample.get("group") or row["task"])
        columns["outcome"].append("shots" if row["role"] == "shots" else _outcome(sample.get("correct")))
        columns["document_id"].append(f"{row['task']}/{'shots' if row['role'] == 'shots' else row['sample_id']}")
        stands = row["choice"] in (-1, sample.get("gold")) and row["repeat"] in (-1, 0)
        columns["counted"].append(bool(row["role"] == "sample" and stands))
    return sequences.assign(**columns)


def sample_share(
    log: Log, *, by: str = "group", cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the share of choices of each expert over the samples of an evaluation.

    Every sample counts once: its prompt with its generated answer, or with the gold choice. Shots that samples share
    are not counted. Otherwise the result is that of `stats.expert_share`, with intervals over samples.

    Parameters
    ----------
    log : Log
        The evaluation.
    by : str, optional
        "group" (subject or language), "task", "benchmark", or "outcome" (right against wrong answers).
    cluster : str, optional
        Column of the samples whose values are independent if samples are not, such as "group".
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    MissingSignal
        If the evaluation was run without routing.

    Examples
    --------
    >>> settings = ml.evals.EvalSettings(progress=False, routing=True)
    >>> log = ml.evaluate(model, ["demo"], limit=1, settings=settings)
    >>> "expert" in ml.evals.sample_share(log)["estimate"].dims
    True
    """
    return expert_share(samples_of(log), by=by, cluster=cluster, bootstrap=bootstrap)


def flipped_routing(
    log_a: Log, log_b: Log, *, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Measure the agreement of the routing of two evaluations on the same samples, by change of the answer.

    Parameters
    ----------
    log_a : Log
        The first evaluation.
    log_b : Log
        The second evaluation.
    cluster : str, optional
        Column of the samples whose values are independent if samples are not, such as "group".
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    Dataset
        As `stats.agreement` over the tokens of prompts and gold choices, by change: "same" (right in both or wrong in
        both), "lost" (right only in the first) or "gained", with intervals over samples.

    Raises
    ------
    MissingSignal
        If either evaluation was run without routing.
    BadInput
        If the evaluations did not read the same rows.

    Examples
    --------
    >>> ml.evals.flipped_routing(ml.open("runs/bf16"), ml.open("runs/nf4"))  # doctest: +SKIP
    """
    a, b = (samples_of(log).select(phase="prompt") for log in (log_a, log_b))
    keys = ["task", "sample_id", "choice"]
    if a.sequences[keys].to_numpy().tolist() != b.sequences[keys].to_numpy().tolist():
        raise BadInput(
            "Cannot compare the routing of the evaluations: they did not read the same samples in the same order. "
            "Evaluate both on the same tasks, with the same limit and batch_size.",
            argument="samples",
        )
    changes = [_change(*pair) for pair in zip(a.sequences["outcome"], b.sequences["outcome"], strict=True)]
    a.sequences = a.sequences.assign(change=changes)
    return agreement(a, b, by="change", cluster=cluster, bootstrap=bootstrap).rename(document_change="change")


def samples_of(log: Log) -> Trace:
    """Return the rows of an evaluation's trace that represent its samples. Raises MissingSignal without routing."""
    if not isinstance(log, Log):
        raise BadInput(
            f"Cannot read the routing of a {type(log).__name__}: expected an evaluation. Pass the result of "
            "ml.evaluate.",
            argument="log",
            value=type(log).__name__,
        )
    if log.routing is None:
        raise MissingSignal(
            "Cannot read the routing of the samples: the evaluation did not record it. Evaluate a local model with "
            "EvalSettings(routing=True).",
            argument="routing",
        )
    return log.routing.select(where=log.routing.sequences["counted"])


def _outcome(correct: Any) -> str:
    if correct is None or correct != correct:
        return "unscored"
    return {1.0: "right", 0.0: "wrong"}.get(float(correct), "partly")


def _change(before: str, after: str) -> str:
    return {("right", "wrong"): "lost", ("wrong", "right"): "gained"}.get((before, after), "same")
