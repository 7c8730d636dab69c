"""Scores from tables of samples: means with intervals, micro and macro averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = [
    "benchmark", "task", "metric", "average", "score", "ci_low", "ci_high", "n", "unscored", "interval", "protocol",
]  # fmt: skip
NEAR_TIES = ["task", "sample_id", "first", "second", "gap"]
_LEVEL = 0.95
# Log-probabilities in float32 differ by about 1e-5 between batch shapes.
_NEAR = 1e-4


def score_table(samples: pd.DataFrame, tasks: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Compute scores by task and metric, and micro and macro averages over the tasks of each protocol.

    The score is the mean over scored samples, in [0, 1] for a fraction correct. For a metric that lm-eval does not
    average (aggregation other than "mean" or "nanmean") it is the score of lm-eval. "micro" weighs samples equally,
    "macro" tasks. 95 % intervals are Wilson's for a fraction; Student's t, with samples that vary within tasks, for
    other means and for macro; and from the standard error of lm-eval for its aggregations. The score of a task without
    scored samples is NaN, never 0.

    Parameters
    ----------
    samples : pandas.DataFrame
        One row per sample: task, and a column for every metric, NaN if the sample could not be scored.
    tasks : Mapping[str, Mapping[str, Any]]
        By task: benchmark, protocol, and metrics, each {"aggregation": name, "score", "stderr": those of lm-eval}.

    Returns
    -------
    pandas.DataFrame
        benchmark, task, metric, average ("", "micro" or "macro"), score, ci_low, ci_high, n, unscored, interval,
        protocol.
    """
    rows: list[dict[str, Any]] = []
    by_task = {str(name): frame for name, frame in samples.groupby("task", sort=False)} if len(samples) else {}
    for (benchmark, protocol), members in tasks_by_protocol(tasks).items():
        values: dict[str, list[np.ndarray]] = {}
        for name in members:
            about = tasks[name]
            frame = by_task.get(name, pd.DataFrame())
            for metric, how in about["metrics"].items():
                column = frame[metric].to_numpy(float) if metric in frame else np.empty(0)
                row = {"benchmark": benchmark, "task": name, "metric": metric, "protocol": protocol}
                if how["aggregation"] in ("mean", "nanmean"):
                    rows.append(row | {"average": ""} | _mean([column]))
                    values.setdefault(metric, []).append(column)
                else:
                    rows.append(row | {"average": ""} | _own(column, how))
        if len(members) > 1:
            shared = {"benchmark": benchmark, "task": benchmark, "protocol": protocol}
            for metric, columns in values.items():
                rows.append(shared | {"metric": metric, "average": "micro"} | _mean([np.concatenate(columns)]))
                rows.append(shared | {"metric": metric, "average": "macro"} | _mean(columns, macro=True))
    return pd.DataFrame(rows, columns=COLUMNS)


def near_ties(samples: pd.DataFrame, by_length: Collection[str] = ()) -> pd.DataFrame:
    """Return samples whose two most likely choices differ by less than 1e-4, so that rounding decides between them.

    Parameters
    ----------
    samples : pandas.DataFrame
        One row per sample: task, sample_id, choices and their logprobs (None if it has none).
    by_length : Collection[str], optional
        Tasks that compare log-probabilities per character, as acc_norm does. Their gaps are multiplied by the length of
        the shorter choice, where rounding errors weigh most.

    Returns
    -------
    pandas.DataFrame
        task, sample_id, first and second (the two choices, the more likely first), gap (difference of their
        log-probabilities in nats).
    """
    rows = []
    for sample in samples.to_dict("records"):
        choices, logprobs = sample.get("choices"), sample.get("logprobs")
        if not isinstance(choices, list) or not isinstance(logprobs, list) or len(logprobs) < 2:
            continue
        lengths = [len(choice.removeprefix(" ")) for choice in choices] if sample["task"] in by_length else 1
        values = np.array(logprobs, float) / lengths
        first, second = np.argsort(-values, kind="stable")[:2]  # NaN comes last
        gap = (values[first] - values[second]) * np.broadcast_to(lengths, values.shape)[[first, second]].min()
        if gap < _NEAR:
            rows.append((sample["task"], sample["sample_id"], choices[first], choices[second], gap))
    return pd.DataFrame(rows, columns=NEAR_TIES)


def primary_rows(scores: pd.DataFrame, tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per benchmark and protocol: its primary metric, micro-averaged if it has several tasks."""
    rows = []
    for (benchmark, protocol), members in tasks_by_protocol(tasks).items():
        primary, average = tasks[members[0]]["primary"], "micro" if len(members) > 1 else ""
        of = scores[(scores["benchmark"] == benchmark) & (scores["protocol"] == protocol)]
        of = of[of["metric"] == primary]
        rows += [{str(k): v for k, v in row.items()} for row in of[of["average"] == average].to_dict("records")]
    return rows


def wilson(successes: float, n: int, level: float = _LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction (Wilson 1927); NaN without samples."""
    if n == 0:
        return np.nan, np.nan
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def tasks_by_protocol(tasks: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Group the names of tasks by benchmark and protocol; only scores within a group may be averaged."""
    members: dict[tuple[str, str], list[str]] = {}
    for name, about in tasks.items():
        members.setdefault((about["benchmark"], about["protocol"]), []).append(name)
    return members


def _mean(columns: list[np.ndarray], *, macro: bool = False) -> dict[str, Any]:
    from scipy.special import stdtrit  # imported here because it takes a quarter of a second

    scored = [column[np.isfinite(column)] for column in columns]
    n, unscored = sum(map(len, scored)), sum(map(len, columns)) - sum(map(len, scored))
    counts = {"n": n, "unscored": unscored}
    if n == 0 or (macro and not all(map(len, scored))):
        return {"score": np.nan, "ci_low": np.nan, "ci_high": np.nan, "interval": "", **counts}
    score = float(np.mean([column.mean() for column in scored]))
    if not macro and np.isin(scored[0], (0, 1)).all():
        low, high = wilson(float(scored[0].sum()), n)
        return {"score": score, "ci_low": low, "ci_high": high, "interval": "Wilson", **counts}
    if n == len(scored):
        return {"score": score, "ci_low": np.nan, "ci_high": np.nan, "interval": "", **counts}
    # Every task has its own mean, and tasks have equal weights.
    within = sum(((column - column.mean()) ** 2).sum() / len(column) ** 2 for column in scored)
    half = stdtrit(n - len(scored), (1 + _LEVEL) / 2) * np.sqrt(within * n / (n - len(scored))) / len(scored)
    fractions = all(((column >= 0) & (column <= 1)).all() for column in scored)
    low, high = np.clip([score - half, score + half], *((0, 1) if fractions else (-np.inf, np.inf))).tolist()
    return {"score": score, "ci_low": low, "ci_high": high, "interval": "t", **counts}


def _own(column: np.ndarray, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return the aggregate of lm-eval, such as a perplexity or an F1, which is not a mean over samples."""
    score, error = how.get("score"), how.get("stderr")
    score = np.nan if score is None else float(score)
    half = NormalDist().inv_cdf((1 + _LEVEL) / 2) * (np.nan if error is None else float(error))
    known = bool(np.isfinite(half))
    bounds = {"ci_low": score - half, "ci_high": score + half, "interval": "lm-eval's stderr" if known else ""}
    return {"score": score, **bounds, "n": len(column), "unscored": 0}
