"""Log: a finished evaluation, in memory or from its run directory, with scores computed from its samples."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from mixlens.core.run_dir import open_run
from mixlens.core.text import MISSING, NO_INTERVAL
from mixlens.errors import visible
from mixlens.evals.questions import finding_remarks
from mixlens.evals.readings import reading_remarks
from mixlens.evals.replies import reply_remarks
from mixlens.evals.response_cache import cache_remarks
from mixlens.evals.scoring import near_ties, score_table
from mixlens.trace.trace import Trace

RESULTS, LM_EVAL_RESULTS, ROUTING = "results.jsonl", "lm_eval_results.json", "routing"


class Log:
    """Samples and scores of an evaluation.

    Parameters
    ----------
    records : Sequence[dict[str, Any]]
        One dict per sample, as in the lines of results.jsonl. Values that do not apply are None.

        - task: name of the task in lm-eval, such as "mmlu_5shot::anatomy"
        - sample_id: index in the split of the data set; (task, sample_id) is unique
        - doc_hash: sha256 of the document, which identifies the same question in two logs
        - group: subject or language
        - prompt: input of the model as one text
        - target: gold answer as text
        - response: first generated answer, or text of the choice with the highest log-probability
        - responses: every generated answer before any filter
        - choices, logprobs: scored texts, and their log-probabilities in nats, summed over tokens
        - gold: index of the right choice
        - finish: finish reason of the first answer
        - non_answer: reason why the first answer has no text: "length", "filtered", "reasoning only" or "empty"
        - replies: model, reasoning, token counts and attempts of every answer
        - readings: form in which a grader found every answer; for a program, its outcome
        - metrics: {metric: value}; a value is None if the sample could not be scored
        - correct: value of the primary metric of the task
    meta : dict[str, Any]
        Model, tasks (by task: benchmark, protocol, metrics, primary, data), settings, versions and date.
    path : Path, optional
        Run directory; None in memory.
    routing : Trace, optional
        Trace of every row that the model read (see mixlens.evals.routing); None if not recorded.
    """

    kind = "eval"
    routing: Trace | None = None

    def __init__(self, records: Sequence[dict[str, Any]], meta: dict[str, Any], *, path: Path | None = None) -> None:
        self.records, self.meta, self.path = list(records), meta, path

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Log:
        """Open the evaluation in a folder. Raises RunError if there is none, or a run of another kind.

        Parameters
        ----------
        path : str or os.PathLike
            Run directory.
        check : bool, optional
            Whether to compare every file with its checksum when it is first read; False compares only sizes.
        """
        run = open_run(path, "eval", check=check)
        with run.file(RESULTS).open(encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        log = cls(records, run.meta, path=run.path)
        if (routing := run.nested(ROUTING)) is not None:
            log.routing = Trace.open(routing, check=check)
        return log

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row per sample with the fields of a record and a column for every metric, NaN if not scored."""
        frame = pd.DataFrame([{k: v for k, v in r.items() if k != "metrics"} | r["metrics"] for r in self.records])
        numeric = [name for name in [*self.metrics, "correct"] if name in frame]
        return frame.astype(dict.fromkeys(numeric, float)) if numeric else frame

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per task and metric with its 95 % interval, then micro and macro averages (`scoring.score_table`)."""
        return score_table(self.samples, self.meta["tasks"])

    @cached_property
    def near_ties(self) -> pd.DataFrame:
        """Samples whose answer depends on rounding: task, sample_id, first, second, gap (`scoring.near_ties`)."""
        by_length = {name for name, task in self.meta["tasks"].items() if task["primary"] == "acc_norm"}
        return near_ties(self.samples, by_length)

    @property
    def tasks(self) -> list[str]:
        return list(self.meta["tasks"])

    @property
    def metrics(self) -> list[str]:
        """Return every metric of every task, each once."""
        return list(dict.fromkeys(name for about in self.meta["tasks"].values() for name in about["metrics"]))

    def remarks(self) -> list[str]:
        """Return remarks on the scores: model, number of samples, versions, and sources of the data."""
        model, versions = self.meta["model"], self.meta["versions"]
        limit = self.meta["settings"].get("limit")
        cut = "" if limit is None else f" Only the first {limit} samples of every task: no score of the benchmark."
        unscored = int(self.scores.loc[self.scores["average"] == "", "unscored"].sum())
        lost = f" {unscored} values could not be scored and are in no mean." if unscored else ""
        near = f" In {len(self.near_ties)} the two likeliest choices lie within 1e-4." if len(self.near_ties) else ""
        return [
            f"{_at(model['name'], model.get('revision'))}, {self.meta['created']}; "
            f"lm-eval {versions.get('lm_eval', 'n/a')}.",
            f"{len(self.records)} samples. Intervals: 95 %.{cut}{lost}{near}",
            *reply_remarks(self.records, self.meta),
            *reading_remarks(self.records),
            *finding_remarks(self.meta.get("preflight") or []),
            *(self.meta.get("beside_lm_eval") or []),
            *cache_remarks(self.meta.get("answers") or {}),
            *self._sources(),
        ]

    def _sources(self) -> list[str]:
        found = [about["data"] for about in self.meta["tasks"].values() if about.get("data", {}).get("repository")]
        named = [_at(d["repository"], d["revision"]) + (" (local)" if d["from"] == "folder" else "") for d in found]
        return [f"Data: {', '.join(dict.fromkeys(named))}."] if named else []

    def __repr__(self) -> str:
        return visible("\n".join([self._shown().to_string(index=False), *self.remarks()]))

    def _repr_html_(self) -> str:
        said = "".join(f"<div>{html.escape(remark)}</div>" for remark in self.remarks())
        return f"<div class='mixlens-log'>{self._shown().to_html(border=0, index=False)}{said}</div>"

    def _shown(self) -> pd.DataFrame:
        """Format the scores as text; a benchmark with several tasks is shown by its averages."""
        of_protocol = self.scores.groupby(["benchmark", "protocol"])["task"]
        several = {key for key, n in of_protocol.nunique().items() if n > 1}
        rows = []
        for row in self.scores.to_dict("records"):
            if (row["benchmark"], row["protocol"]) in several and not row["average"]:
                continue
            rows.append(
                {
                    "benchmark": row["benchmark"],
                    "metric": " ".join(filter(None, (row["metric"], row["average"]))),
                    "score": MISSING if row["score"] != row["score"] else f"{row['score']:.4f}",
                    "95 %": NO_INTERVAL
                    if row["ci_low"] != row["ci_low"]
                    else f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]",
                    "n": row["n"],
                    "protocol": row["protocol"],
                }
            )
        return pd.DataFrame(rows, columns=["benchmark", "metric", "score", "95 %", "n", "protocol"])


def _at(name: str, commit: str | None) -> str:
    return name if commit is None else f"{name} at {commit[:12]}"
