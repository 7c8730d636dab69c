"""Quality, cost and speed of served models, from evaluations and benchmarks or given directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixlens.bench.bench import Bench
from mixlens.endpoints.endpoint import canonical
from mixlens.endpoints.prices import cost, prices, provider_at, statements
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.scoring import primary_rows


@dataclass(frozen=True)
class Candidate:
    """Score, cost and speed of a served model. NaN for an unknown number.

    Parameters
    ----------
    name : str
        Label in the figure.
    score : tuple[float, float, float]
        Score in one benchmark and protocol with its interval (estimate, low, high); higher is better.
    usd_per_mtok : float
        Dollars per million tokens of the workload.
    tokens_per_s : tuple[float, float, float]
        Output speed with its interval (estimate, low, high).
    source : str, optional
        Origin of the numbers.
    benchmark : str, optional
        Name of the score; it must be the same for all candidates in a comparison.

    Examples
    --------
    >>> ml.pricing.Candidate("local", (70.6, 69.9, 71.3), 0.0, (90.0, 85.0, 95.0)).name
    'local'
    """

    name: str
    score: tuple[float, float, float]
    usd_per_mtok: float
    tokens_per_s: tuple[float, float, float]
    source: str = ""
    benchmark: str = ""


def candidates(
    runs: Sequence[Log | Bench],
    *,
    score: str | None = None,
    names: Mapping[str, str] | None = None,
    tokens: tuple[int, int] = (1000, 500),
    table: pd.DataFrame | None = None,
) -> list[Candidate]:
    """Combine each load of each benchmark with the score of the evaluation of the same model.

    Models match if their routers and weights are the same, or, if those are unknown, their names and aliases. Weight
    format and revision must be equal if both are known. The score is that of the primary metric with its interval, in
    percent; the speed is the median output speed per request with its interval, at one load. Each price statement gives
    a candidate; the price of a model on this machine is unknown.

    Parameters
    ----------
    runs : Sequence[Log or Bench]
        Evaluations and benchmarks in any order. Every benchmark needs an evaluation of its model, and vice versa.
    score : str, optional
        Benchmark or protocol to use; None if the evaluations have exactly one in common.
    names : Mapping[str, str], optional
        Model names by the name used in a benchmark or an evaluation, such as
        {"mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1"} for a server with an alias.
    tokens : tuple[int, int], optional
        Input and output tokens per request, which weight the two prices.
    table : pandas.DataFrame, optional
        Prices with provider and model, such as the result of listed_prices; None for the snapshot. The provider of
        your own server is its host.

    Returns
    -------
    list[Candidate]

    Raises
    ------
    BadInput
        If a model was evaluated but not benchmarked or vice versa, the evaluations share no benchmark, protocol and
        metric, a model was edited, or lower is better for the metric.

    Examples
    --------
    >>> ml.pricing.candidates([ml.open("runs/mmlu"), ml.open("runs/vllm")])  # doctest: +SKIP
    """
    names = names or {}
    logs = [run for run in runs if isinstance(run, Log)]
    benches = [part for run in runs if isinstance(run, Bench) for part in run.configurations().values()]
    if not logs or not benches or not all(isinstance(run, Log | Bench) for run in runs):
        given = ", ".join(type(run).__name__ for run in runs) or "nothing"
        raise BadInput(
            f"Cannot compare quality, cost and speed of {given}. Pass evaluations and benchmarks of the same models, "
            "as [log, bench], or Candidates alone.",
            argument="runs",
            value=[type(run).__name__ for run in runs],
        )
    pairs = [(bench, _log_of(bench, logs, names)) for bench in benches]
    if alone := [log for log in logs if all(log is not other for _, other in pairs)]:
        raise BadInput(
            f"Cannot compare quality, cost and speed: {_called(alone[0])} was evaluated and not benchmarked: the "
            f"benchmarks are of {_list(benches)}. Benchmark it, leave it out, or match the names by names=.",
            argument="runs",
            value=_called(alone[0]),
        )
    scored = {id(log): row for log, row in zip(logs, _scores(logs, score), strict=True)}
    table = prices() if table is None else statements(table.to_dict("records"))
    found = [
        candidate for bench, log in pairs for candidate in _candidates(bench, scored[id(log)], names, (tokens, table))
    ]
    labels = [one.name for one in found]
    return [
        one if labels.count(one.name) == 1 else Candidate(**{**vars(one), "name": f"{one.name} ({at + 1})"})
        for at, one in enumerate(found)
    ]


def frontier(given: Sequence[Candidate]) -> pd.DataFrame:
    """Tabulate candidates and mark the Pareto frontier of score, price and speed.

    A candidate is on the frontier if no other is at least as good in all three and better in one. A candidate that
    lacks a number is compared with none.

    Parameters
    ----------
    given : Sequence[Candidate]
        The candidates.

    Returns
    -------
    DataFrame
        name, score, score_low, score_high, usd_per_mtok, tokens_per_s, tokens_per_s_low, tokens_per_s_high,
        frontier (True, False, or NA if a number is missing), source, benchmark.

    Raises
    ------
    BadInput
        If there is no candidate, two have the same name, or the scores are of several benchmarks.

    Examples
    --------
    >>> one = ml.pricing.Candidate("local", (70.6, 69.9, 71.3), 0.2, (90.0, 85.0, 95.0))
    >>> ml.pricing.frontier([one])["frontier"].tolist()
    [True]
    """
    if not given or len({one.name for one in given}) < len(given):
        raise BadInput(
            f"Cannot compare {len(given)} candidates: the list is empty, or two have the same name. Pass a list of "
            "Candidates, each with its own name.",
            argument="candidates",
            value=len(given),
        )
    if len(benchmarks := dict.fromkeys(one.benchmark for one in given)) > 1:
        raise BadInput(
            f"Cannot compare {len(given)} candidates: their scores are of {' and '.join(map(repr, benchmarks))}. Pass "
            "scores of one benchmark and protocol.",
            argument="score",
            value=benchmarks,
        )
    rows = [
        {
            "name": one.name,
            **dict(zip(("score", "score_low", "score_high"), one.score, strict=True)),
            "usd_per_mtok": one.usd_per_mtok,
            **dict(zip(("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"), one.tokens_per_s, strict=True)),
            "source": one.source,
            "benchmark": one.benchmark,
        }
        for one in given
    ]
    frame = pd.DataFrame(rows)
    goods = frame[["score", "usd_per_mtok", "tokens_per_s"]].to_numpy(float) * [1, -1, 1]
    whole = np.isfinite(goods).all(axis=1)
    # [candidate, other]: whether the other is known, at least as good in all three, and better in one.
    no_worse = np.all(goods[None, :, :] >= goods[:, None, :], axis=-1)
    better = np.any(goods[None, :, :] > goods[:, None, :], axis=-1)
    beaten = np.any(no_worse & better & np.asarray(whole), axis=1)
    on = pd.array(~beaten, dtype="boolean")
    on[~whole] = pd.NA
    frame.insert(len(frame.columns) - 2, "frontier", on)
    return frame


def _log_of(bench: Bench, logs: Sequence[Log], names: Mapping[str, str]) -> Log:
    """Return the only evaluation of the benchmarked model."""
    why = [_difference(log, bench, names) for log in logs]
    found = [log for log, reason in zip(logs, why, strict=True) if not reason]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(
            f"Cannot compare quality, cost and speed: {_called(bench)} was benchmarked, and evaluated {len(found)} "
            "times. Pass one evaluation of each model.",
            argument="runs",
            value=len(found),
        )
    raise BadInput(
        f"Cannot compare quality, cost and speed: {_called(bench)} was benchmarked, but no evaluation belongs to it: "
        f"{'; '.join(dict.fromkeys(why))}. Evaluate it, leave it out, or match the names by names=.",
        argument="runs",
        value=_called(bench),
    )


def _difference(log: Log, bench: Bench, names: Mapping[str, str]) -> str:
    """Return why an evaluation is not of the benchmarked model; "" if it is."""
    one, other = log.meta["model"], bench.meta["model"]
    if one.get("edits"):
        return f"{_called(log)} was evaluated with edits"
    routers = one.get("router_sha256"), other.get("router_sha256")
    named = [_model(run, names) for run in (log, bench)]
    if all(routers) and routers[0] != routers[1]:
        return f"{named[0]} was evaluated, and its routers are others"
    if not all(routers) and named[0].lower() != named[1].lower():
        return f"{named[0]} was evaluated"
    for what, said in (("held in", _held), ("of revision", lambda model: model.get("revision"))):
        if said(one) and said(other) and said(one) != said(other):
            return f"{named[0]} was evaluated {what} {said(one)}, and benchmarked {what} {said(other)}"
    return ""


def _held(model: Mapping[str, Any]) -> str | None:
    return (model.get("audit") or {}).get("label")


def _scores(logs: Sequence[Log], asked: str | None) -> list[dict[str, Any]]:
    """Return the row of each evaluation for the one score that all share, with a description in "what"."""
    by_log = []
    for log in logs:
        limit = log.meta["settings"].get("limit")
        rows = {}
        for row in primary_rows(log.scores, log.meta["tasks"]):
            cut = "" if limit is None else f", first {limit} of each task"
            what = (
                f"{row['benchmark']}, {row['protocol']}: {' '.join(filter(None, (row['metric'], row['average'])))}{cut}"
            )
            if asked is None or asked in (row["benchmark"], row["protocol"]):
                rows[what] = row | {"what": what}
        by_log.append(rows)
    common = [what for what in by_log[0] if all(what in rows for rows in by_log)]
    if len(common) != 1:
        told = "; ".join(
            f"{_called(log)}: {' and '.join(rows) or 'none'}" for log, rows in zip(logs, by_log, strict=True)
        )
        whose = "" if asked is None else f" by {asked!r}"
        raise BadInput(
            f"Cannot compare quality, cost and speed{whose}: the evaluations share "
            f"{'no score' if not common else f'{len(common)} scores'} ({told}). "
            + ("Name one benchmark by score=." if common else "Pass evaluations of one benchmark, protocol and limit."),
            argument="score",
            value=len(common),
        )
    found = [rows[common[0]] for rows in by_log]
    for log, row in zip(logs, found, strict=True):
        about = next(one for one in log.meta["tasks"].values() if one["protocol"] == row["protocol"])
        if not about["metrics"][row["metric"]].get("higher_is_better", True):
            raise BadInput(
                f"Cannot compare quality, cost and speed by {row['what']}: lower is better for this metric. Name a "
                "benchmark by score= for which higher is better.",
                argument="score",
                value=row["what"],
            )
    if len(sizes := {row["n"] + row["unscored"] for row in found}) > 1:
        raise BadInput(
            f"Cannot compare quality, cost and speed by {common[0]}: the evaluations have "
            f"{' and '.join(map(str, sorted(sizes)))} samples of it. Evaluate all models on the same data.",
            argument="limit",
            value=sorted(sizes),
        )
    return found


def _candidates(
    bench: Bench, score: Mapping[str, Any], names: Mapping[str, str], priced: tuple[tuple[int, int], pd.DataFrame]
) -> list[Candidate]:
    """Create one candidate per load and price statement."""
    (read, written), table = priced
    model, where, rows = _model(bench, names), "this machine", pd.DataFrame()
    if "endpoint" in bench.meta:
        where = provider_at(bench.meta["endpoint"]["url"])
        rows = table[(table["provider"] == where) & (table["model"] == model)]
    prices_of = [(float("nan"), "", "no price known")]
    if len(rows):
        usd = cost(read, written, table=rows)["usd_per_request"] * 1e6 / (read + written)
        prices_of = [
            (
                value,
                f", ${value:,.3g}/Mtok" if len(rows) > 1 else "",
                f"price: {row['source']} {row['as_of']}".rstrip(),
            )
            for value, row in zip(usd.to_numpy(float), rows.to_dict("records"), strict=True)
        ]
    speeds = bench.table().query("metric == 'output_tokens_per_s' and statistic == 'p50'")
    percent = (100 * float(score["score"]), 100 * float(score["ci_low"]), 100 * float(score["ci_high"]))
    found = []
    for speed in speeds.to_dict("records"):
        load = f", {speed['level']}" if len(speeds) > 1 else ""
        measured = f"speed at {speed['level']} over {speed['n']} requests, {bench.meta['created'][:10]}"
        for usd, price, source in prices_of:
            found.append(
                Candidate(
                    f"{model.rstrip('/').rsplit('/', 1)[-1]}, {where}{load}{price}",
                    percent,
                    usd,
                    (speed["estimate"], speed["ci_low"], speed["ci_high"]),
                    f"{score['what']} over {score['n']} samples; {measured}; {source} ({read:,} in, {written:,} out)",
                    f"{score['what']} [%]",
                )
            )
    return found


def _model(run: Log | Bench, names: Mapping[str, str]) -> str:
    name = str(run.meta["model"]["name"])
    return canonical(names.get(name, name))


def _called(run: Log | Bench) -> str:
    return str(run.meta["model"]["name"])


def _list(runs: Sequence[Log | Bench]) -> str:
    return " and ".join(dict.fromkeys(map(_called, runs)))
