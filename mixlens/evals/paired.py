"""Paired comparison of two evaluations of the same samples, with tests of their difference."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput, visible
from mixlens.evals.log import Log
from mixlens.evals.scoring import tasks_by_protocol
from mixlens.stats.multiplicity import adjusted, p_against

COLUMNS = [
    "benchmark", "task", "protocol", "metric", "score_a", "score_b", "difference", "ci_low", "ci_high", "p_value",
    "q", "survives", "only_a", "only_b", "n", "left_out",
]  # fmt: skip
_SHOWN = ("prompt", "target", "choices", "gold")
_OF_EACH = ("response", "logprobs", "correct")
_LEADS = "the exact test leads, since at any number of flips it is wrong in at most 5 % of cases without a difference."
# Keys: whether the test finds a difference.
_DISAGREE = {
    False: f"The interval alone leaves out 0; {_LEADS}",
    True: f"The interval does not leave out 0; {_LEADS}",
}


def compare_logs(log_a: Log, log_b: Log, *, bootstrap: Bootstrap = DEFAULT) -> LogComparison:
    """Compare two evaluations of the same samples, joined by task and sample.

    Tasks in only one log are listed but not compared. A sample without a score in either log is left out and counted.

    Raises BadInput if a benchmark was run with different protocols or versions, or with a chat template in only one
    log; if no task is in both logs; or if the document of a sample differs.
    """
    common = _common_tasks(log_a.meta["tasks"], log_b.meta["tasks"])
    joined = _joined(log_a.samples, log_b.samples, common)
    about = {name: log_a.meta["tasks"][name] for name in common}
    rows = []
    groups = tasks_by_protocol(about)
    benchmarks = [benchmark for benchmark, _ in groups]
    for (benchmark, protocol), members in groups.items():
        shared = {"benchmark": benchmark, "protocol": protocol, "metric": about[members[0]]["primary"]}
        if len(members) > 1:
            label = benchmark if benchmarks.count(benchmark) == 1 else protocol
            whole = {**shared, "task": label, "family": "benchmarks"}
            rows.append(whole | _row(joined[joined["task"].isin(members)], bootstrap))
        shared["family"] = protocol if len(members) > 1 else "benchmarks"
        rows += [{**shared, "task": name, **_row(joined[joined["task"] == name], bootstrap)} for name in members]
    names = _names(log_a, log_b)
    alone = sorted(set(log_a.meta["tasks"]) ^ set(log_b.meta["tasks"]))
    table = _with_survivors(pd.DataFrame(rows), bootstrap)
    return LogComparison(log_a, log_b, names, table, _flips(joined), joined, alone, bootstrap)


@dataclass
class LogComparison:
    """Sample-by-sample comparison of two evaluations.

    Parameters
    ----------
    names : tuple[str, str]
        Names of the evaluations.
    table : pandas.DataFrame
        One row per benchmark, and one per task of a benchmark with several: score_a, score_b, difference (b minus a)
        with its interval, p_value of the exact McNemar test (of the interval, for a metric that is not right or wrong),
        q (p_value adjusted for the number of benchmarks, or of tasks within a benchmark, after Benjamini and Hochberg
        1995), survives (whether q is at most one minus the level), only_a and only_b (samples right in only one
        evaluation; NaN for a metric that is not right or wrong), n, left_out (samples in one log only, or not scored).
    flips : pandas.DataFrame
        Samples right in one evaluation and wrong in the other: task, sample_id, change ("lost" or "gained", in b),
        prompt, target, choices, gold, and response, logprobs and correct of each.
    joined : pandas.DataFrame
        Samples of the common tasks.
    alone : list[str]
        Tasks in only one log.
    """

    log_a: Log
    log_b: Log
    names: tuple[str, str]
    table: pd.DataFrame
    flips: pd.DataFrame
    joined: pd.DataFrame
    alone: list[str]
    bootstrap: Bootstrap

    kind = "eval comparison"

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata of both evaluations."""
        return {"model": {"name": " and ".join(self.names)}, "a": self.log_a.meta, "b": self.log_b.meta}

    def verdicts(self) -> list[str]:
        """Return one sentence per row of the table with its result."""
        return [self._verdict(row) for row in self.table.to_dict("records")]

    def remarks(self) -> list[str]:
        """Return the remarks on the table."""
        said = [
            f"Difference: {self.names[1]} less {self.names[0]}, on the same samples; {self.bootstrap.level:.0%} "
            "intervals over samples within tasks (Bonett and Price 2012); exact McNemar test, whose q is adjusted "
            "for the number of benchmarks, and of the tasks of each benchmark (Benjamini and Hochberg). A difference "
            f"is one where q is at most {1 - self.bootstrap.level:.2g}."
        ]
        if other := int((self.joined["prompt_a"] != self.joined["prompt_b"]).sum()):
            said.append(f"{other} samples were asked in other words: chat templates or shots differ.")
        if self.alone:
            said.append(f"In one evaluation only, and not compared: {', '.join(self.alone)}.")
        return said

    def _verdict(self, row: Mapping[Any, Any]) -> str:
        a, b = self.names
        n, where = int(row["n"]), row["task"]
        if not n:
            return f"{where}: no sample that both could score."
        scores = f"{where}: {a} {row['score_a']:.3f}, {b} {row['score_b']:.3f} on the same {n} samples"
        binary = not math.isnan(row["only_a"])
        counts = f"{int(row['only_a'])} right in {a} only, {int(row['only_b'])} in {b} only" if binary else ""
        if binary and not row["only_a"] + row["only_b"]:
            return f"{scores}. Every sample is right in both or wrong in both; the data cannot tell them apart."
        chance = _chance(row) if binary else ""
        apart = bool(row["survives"])
        interval = f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        details = "; ".join(filter(None, (counts, chance)))
        details = f" ({details})" if details else ""
        tested = row["p_value"] <= 1 - self.bootstrap.level
        differ = f" {_DISAGREE[tested]}" if binary and tested != _leaves_out_0(row) else ""
        if not apart:
            return f"{scores}. The data cannot tell them apart: {interval}{details}.{differ}"
        better, worse = (b, a) if row["difference"] > 0 else (a, b)
        return f"{scores}. {better} is better than {worse}: {interval}{details}.{differ}"

    def __repr__(self) -> str:
        return visible("\n".join([*self.verdicts(), "", *self.remarks()]))

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{html.escape(verdict)}</li>" for verdict in self.verdicts())
        notes = "".join(f"<div>{html.escape(remark)}</div>" for remark in self.remarks())
        shown = self.table.to_html(border=0, index=False, float_format="{:.4f}".format, na_rep="n/a")
        return f"<div class='mixlens-comparison'><ul>{said}</ul>{shown}{notes}</div>"


def _with_survivors(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """Add q and survives to the table: benchmarks are one family of tests, the tasks of each benchmark another.

    If McNemar's test and the interval disagree, the test decides: its false positive rate is at most 5 % at every
    number of flips, at the price of lower power (Fagerland, Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91). An
    interval keeps its level only on average over the rate of flips.
    """
    table["q"] = table.groupby("family")["p_value"].transform(lambda p: adjusted(p.to_numpy(float)))
    table["survives"] = table["q"] <= 1 - bootstrap.level
    return table[COLUMNS]


def _leaves_out_0(row: Mapping[Any, Any]) -> bool:
    return bool(row["ci_low"] > 0 or row["ci_high"] < 0)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p value of the exact McNemar test (1947) for discordant pairs; 1.0 without any.

    min(1, 2 P(X <= min(b, c))) with X binomial (b + c, 1/2).
    """
    from scipy.special import bdtr  # imported here because it takes a quarter of a second

    n, least = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(least, n, 0.5)))


def paired_difference(a: np.ndarray, b: np.ndarray, task: np.ndarray, level: float) -> tuple[float, float, float]:
    """Return the mean of b minus a over samples, with its interval; samples vary within tasks, and tasks are fixed.

    For right and wrong answers the interval is that of Bonett and Price (2012): Wald's with one more sample gained and
    one more lost, so that it has a width even for two models with the same answers. For other scores it is Student's t.
    """
    from scipy.special import stdtrit  # imported here because it takes a quarter of a second

    difference, n = b - a, len(a)
    names, number = np.unique(task, return_inverse=True)
    if n <= len(names):
        return (float(difference.mean()) if n else math.nan), math.nan, math.nan
    estimate, freedom = float(difference.mean()), float(n - len(names))
    if np.isin([a, b], (0, 1)).all():
        freedom, largest = math.inf, np.bincount(number).argmax()
        difference, number = np.append(difference, [1, -1]), np.append(number, [largest, largest])
    n = len(difference)
    within = difference - (np.bincount(number, difference) / np.bincount(number))[number]
    variance = (within**2).sum() / n**2 * (n / (n - len(names)) if math.isfinite(freedom) else n / (n - len(names) + 1))
    centre, half = difference.mean(), stdtrit(freedom, (1 + level) / 2) * math.sqrt(variance)
    least, most = (-1.0, 1.0) if freedom == math.inf else (-math.inf, math.inf)
    return estimate, float(max(min(centre - half, estimate), least)), float(min(max(centre + half, estimate), most))


def _row(joined: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, Any]:
    known = joined[joined["correct_a"].notna() & joined["correct_b"].notna()]
    a, b = known["correct_a"].to_numpy(float), known["correct_b"].to_numpy(float)
    binary = bool(len(a)) and bool(np.isin([a, b], (0, 1)).all())
    only_a, only_b = (int((a > b).sum()), int((b > a).sum())) if binary else (math.nan, math.nan)
    difference, low, high = paired_difference(a, b, known["task"].to_numpy(), bootstrap.level)
    n = len(known) - known["task"].nunique() + 1
    of_interval = float(p_against(difference, low, high, 0.0, n, bootstrap.level)) if len(known) else math.nan
    return {
        "score_a": a.mean() if len(a) else math.nan,
        "score_b": b.mean() if len(b) else math.nan,
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "p_value": mcnemar(int(only_a), int(only_b)) if binary else of_interval,
        "only_a": only_a,
        "only_b": only_b,
        "n": len(known),
        "left_out": len(joined) - len(known),
    }


def _common_tasks(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> list[str]:
    in_both = tasks_by_protocol(a).keys() & tasks_by_protocol(b).keys()
    for one in a.values():
        for other in b.values():
            keys = {(about["benchmark"], about["protocol"]) for about in (one, other)}
            if one["benchmark"] != other["benchmark"] or (len(keys) == 2 and keys & in_both):
                continue
            for key in ("protocol", "version", "primary", "chat"):
                if one.get(key) != other.get(key):
                    raise BadInput(
                        f"Cannot compare the evaluations: {one['benchmark']} has {key} {one.get(key)!r} in the first "
                        f"and {other.get(key)!r} in the second, so the scores measure different things. Evaluate both "
                        "by one protocol.",
                        argument=key,
                        value=(one.get(key), other.get(key)),
                    )
    common = [name for name in a if name in b]
    if not common:
        raise BadInput(
            f"Cannot compare the evaluations: they have no task in common ({', '.join(a)} and {', '.join(b)}). "
            "Evaluate both on the same tasks.",
            argument="tasks",
            value=(list(a), list(b)),
        )
    return common


def _joined(a: pd.DataFrame, b: pd.DataFrame, tasks: list[str]) -> pd.DataFrame:
    """Join the samples of both logs by task and sample_id, with suffixes _a and _b."""
    key = ["task", "sample_id"]
    kept = [*key, "doc_hash", *_SHOWN, *_OF_EACH]
    sides = [frame[frame["task"].isin(tasks)].reindex(columns=kept) for frame in (a, b)]
    joined = sides[0].merge(sides[1], on=key, how="outer", suffixes=("_a", "_b"), validate="1:1", indicator="found_in")
    both = joined[joined["found_in"] == "both"]
    other = both[both["doc_hash_a"] != both["doc_hash_b"]]
    if len(other):
        task, sample = other.iloc[0]["task"], other.iloc[0]["sample_id"]
        raise BadInput(
            f"Cannot compare the evaluations: sample {sample} of {task} is a different document in each, as are "
            f"{len(other)} of {len(both)} samples. Evaluate both on the same data.",
            argument="samples",
            value=(task, int(sample), len(other)),
        )
    if both.empty:
        raise BadInput(
            f"Cannot compare the evaluations: they have no sample of {', '.join(tasks)} in common. Evaluate both with "
            "the same limit, or none.",
            argument="samples",
            value=0,
        )
    return joined


def _flips(joined: pd.DataFrame) -> pd.DataFrame:
    a, b = joined["correct_a"], joined["correct_b"]
    flipped = joined[a.notna() & b.notna() & (a != b)].reset_index(drop=True)
    change = np.where(flipped["correct_b"] > flipped["correct_a"], "gained", "lost")
    shown = {name: flipped[f"{name}_a"] for name in _SHOWN}
    sides = {f"{name}_{side}": flipped[f"{name}_{side}"] for name in _OF_EACH for side in "ab"}
    return pd.DataFrame(
        {"task": flipped["task"], "sample_id": flipped["sample_id"], "change": change, **shown, **sides}
    )


def _chance(row: Mapping[Any, Any]) -> str:
    """Format p, and q if it differs."""
    p = _probability("p", row["p_value"])
    return p if row["q"] == row["p_value"] else f"{p}, {_probability('q', row['q'])}"


def _probability(name: str, value: float) -> str:
    return f"{name} < 0.0001" if value < 1e-4 else f"{name} = {value:.{4 if value < 0.1 else 2}f}"


def _names(a: Log, b: Log) -> tuple[str, str]:
    """Return the names of the folders, else of the models, made distinct if they are equal."""
    first, second = (
        log.path.name if log.path is not None else str(log.meta["model"]["name"]).rsplit("/", 1)[-1] for log in (a, b)
    )
    return (first, second) if first != second else (f"{first} (first)", f"{second} (second)")
