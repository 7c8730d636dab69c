"""compare_benches: ratios between the metrics of two benchmarks, with intervals."""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pandas as pd

from mixlens.bench import metrics
from mixlens.bench.bench import Bench
from mixlens.bench.load_generator import turn_edges
from mixlens.bench.metrics import P99_SAMPLES, STATISTICS, output_tokens
from mixlens.bench.prompts import workload_words
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput, visible
from mixlens.stats.multiplicity import adjusted, p_against

_METRICS = (
    "ttft_s",
    "tpot_s",
    "e2e_token_s",
    "e2e_stream_s",
    "scheduled_ttft_s",
    "scheduled_e2e_s",
    "output_tokens_per_s",
)
_CACHED = 0.05  # shares of cached tokens that differ by more make loads unlike
_SHOWN = (("ttft_s", "p50"), ("tpot_s", "p50"), ("e2e_token_s", "p50"), ("system_output_tokens_per_s", "rate"))


@dataclass(frozen=True)
class BenchComparison:
    """Comparison of two benchmarks, as returned by `ml.compare`.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per load, metric and statistic: a, b, ratio (b / a), ci_low, ci_high, n_a, n_b, paired; and
        p against a ratio of 1, q (p adjusted for all rows, Benjamini and Hochberg 1995) and survives.
    remarks : tuple[str, ...]
        Remarks that qualify the numbers.
    unlike : tuple[str, ...], optional
        Loads at which the shares of cached input tokens differ, so that the ratio does not measure speed.

    Examples
    --------
    >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
    >>> bench = ml.benchmark(model, requests=2, workload=ml.bench.Workload(16, 2), settings=settings)
    >>> ml.compare(bench, bench).kind
    'bench comparison'
    """

    table: pd.DataFrame
    remarks: tuple[str, ...]
    unlike: tuple[str, ...] = ()

    kind = "bench comparison"

    def overview(self) -> pd.DataFrame:
        """Return medians and throughput by load and metric as text, and whether a ratio other than 1 survives.

        Returns
        -------
        DataFrame
            load, metric, a, b, b / a, different.
        """
        rows = []
        for metric, statistic in _SHOWN:
            for row in self.table.query("metric == @metric and statistic == @statistic").to_dict("records"):
                known = row["ratio"] == row["ratio"]
                interval = f" [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" if row["ci_low"] == row["ci_low"] else ""
                apart = "yes" if row["survives"] else "no"
                rows.append(
                    {
                        "load": row["level"],
                        "metric": f"{metric} {statistic}",
                        "a": f"{row['a']:.4g}" if known else "n/a",
                        "b": f"{row['b']:.4g}" if known else "n/a",
                        "b / a": f"{row['ratio']:.2f}{interval}" if known else "n/a",
                        "different": apart if interval and row["level"] not in self.unlike else "n/a",
                    }
                )
        return pd.DataFrame(rows, columns=["load", "metric", "a", "b", "b / a", "different"])

    def __repr__(self) -> str:
        return visible("\n".join([self.overview().to_string(index=False), *self.remarks]))

    def _repr_html_(self) -> str:
        said = "".join(f"<div>{html.escape(remark)}</div>" for remark in self.remarks)
        return f"<div class='mixlens-bench'>{self.overview().to_html(border=0, index=False)}{said}</div>"


def compare_benches(a: Bench, b: Bench, *, bootstrap: Bootstrap = DEFAULT) -> BenchComparison:
    """Compute the ratio of b's metrics to a's at each load that both have.

    ratio = statistic of b / statistic of a, over the measured requests that succeeded. Intervals come from a bootstrap
    over requests. If the two were measured in turns (`benchmark_together`), the bootstrap draws pairs of successful
    requests with the same number, so that drift affects both. Otherwise it draws the requests of each separately, and
    drift between the runs shifts the ratio without widening the interval. System throughput is paired by turn if there
    were turns; otherwise its interval is that of the ratio of two independent rates (see _system). The 99th percentile
    has no row below 100 requests.

    Raises BadInput if the benchmarks share no load or differ in prompts or lengths. The seed may differ.
    """
    first, second = (bench.requests().query("phase == 'measured'") for bench in (a, b))
    levels = [level for level in dict.fromkeys(first["level"]) if level in set(second["level"])]
    if not levels:
        raise BadInput(
            "Cannot compare the benchmarks: they share no load. The first has "
            f"{', '.join(dict.fromkeys(first['level']))}, the second {', '.join(dict.fromkeys(second['level']))}. "
            "Measure both under the same loads.",
            argument="loads",
            value=(list(dict.fromkeys(first["level"])), list(dict.fromkeys(second["level"]))),
        )
    _check_workloads(a, b)
    paired = _in_turns(a, b)
    rows = []
    for level in levels:
        one, other = (frame[frame["level"] == level].set_index("index") for frame in (first, second))
        for metric in _METRICS:
            rows += _requests(level, metric, one[metric].dropna(), other[metric].dropna(), paired, bootstrap)
    table = _with_survivors(pd.concat([pd.DataFrame(rows), _system(a, b, levels)], ignore_index=True), bootstrap)
    shares = metrics.cached_frac(a.records), metrics.cached_frac(b.records)
    unlike = tuple(level for level in levels if not abs(_known(shares[0][level]) - _known(shares[1][level])) < _CACHED)
    remarks = list(_remarks(a, b, paired, bootstrap))
    for level in unlike:
        one, other = (f"{_known(side[level]):.0%}" for side in shares)
        remarks.append(
            f"At {level} {one} of a's input tokens came from a prefix cache and {other} of b's: the ratios do "
            "not measure speed. Measure both with different prompts."
        )
    return BenchComparison(table, tuple(remarks), unlike)


def _known(share: float) -> float:
    return share if share == share else 0.0


def _check_workloads(a: Bench, b: Bench) -> None:
    one, other = (bench.meta.get("workload") for bench in (a, b))
    if one and other and {**one, "seed": None} != {**other, "seed": None}:
        raise BadInput(
            f"Cannot compare the benchmarks: their workloads differ. The first has {workload_words(one)}; the second "
            f"has {workload_words(other)}. Measure both with the same workload.",
            argument="workload",
            value=(one, other),
        )


def _requests(
    level: str, metric: str, one: pd.Series, other: pd.Series, paired: bool, bootstrap: Bootstrap
) -> list[dict]:
    if paired:
        both = one.index.intersection(other.index)
        one, other = one.loc[both], other.loc[both]
    a, b = one.to_numpy(float), other.to_numpy(float)
    if not (len(a) and len(b)):
        return []
    estimate = _statistics(b) / _statistics(a)
    low, high = np.full((2, len(STATISTICS)), np.nan)
    if min(len(a), len(b)) >= 2:
        weights_a = bootstrap.draw(len(a))
        weights_b = weights_a if paired else bootstrap.draw(len(b), stream=1)
        ratios = _drawn(b, weights_b) / _drawn(a, weights_a)
        # Expanded percentiles (Hesterberg 2015, section 5.2): plain percentiles undercover with few requests.
        tail = 100 * NormalDist().cdf(-float(bootstrap.reach(np.array([float(min(len(a), len(b)))]))[0]))
        low = np.minimum(np.percentile(ratios, tail, axis=0), estimate)
        high = np.maximum(np.percentile(ratios, 100 - tail, axis=0), estimate)
    rows = []
    for i, statistic in enumerate(STATISTICS):
        if statistic == "p99" and min(len(a), len(b)) < P99_SAMPLES:
            continue
        numbers = {
            "a": _statistics(a)[i],
            "b": _statistics(b)[i],
            "ratio": estimate[i],
            "ci_low": low[i],
            "ci_high": high[i],
        }
        n = {"n_a": len(a), "n_b": len(b), "paired": paired, "units": min(len(a), len(b))}
        rows.append({"level": level, "metric": metric, "statistic": statistic, **numbers, **n})
    return rows


def _system(a: Bench, b: Bench, levels: list[str]) -> pd.DataFrame:
    """Compute ratios of system rates, paired by turn if possible and otherwise of two independent rates.

    For independent rates, the variance of ln(b / a) is the sum of the variances of ln a and ln b. In turns, with T_i
    tokens (or requests) in S_i seconds of turn i, the rate is sum T / sum S, and turn i moves ln(b / a) by
    d_i = T_i / sum T - S_i / sum S of b, minus the same of a; drift that both share in a turn cancels. The variance
    is n / (n - 1) * sum d_i^2 (delta method), with a t interval of n - 1 degrees of freedom.
    """
    both = a.throughput().merge(b.throughput(), on=["level", "metric"], suffixes=("_a", "_b"))
    both = both[both["level"].isin(levels)]
    paired = _in_turns(a, b) and "requests" in a.meta["measured_with"]
    rows = []
    for row in both.to_dict("records"):
        level, metric = str(row["level"]), str(row["metric"])
        ratio = row["estimate_b"] / row["estimate_a"]
        turns = [_turns(bench, level, metric) for bench in (a, b)] if paired else None
        if turns is not None:
            reach = _reach_of_turns(*turns)
        else:
            widths = [(row[f"ci_high_{s}"] - row[f"ci_low_{s}"]) / 2 / row[f"estimate_{s}"] for s in "ab"]
            reach = float(np.hypot(*widths))
        rows.append(
            {
                "level": level,
                "metric": "system_" + metric,
                "statistic": "rate",
                "a": row["estimate_a"],
                "b": row["estimate_b"],
                "ratio": ratio,
                "ci_low": ratio * np.exp(-reach),
                "ci_high": ratio * np.exp(reach),
                "n_a": row["n_a"],
                "n_b": row["n_b"],
                "paired": turns is not None,
                "units": min(row["n_a"], row["n_b"]) if turns is None else min(map(len, turns)),
            }
        )
    return pd.DataFrame(rows)


def _with_survivors(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """Test every ratio against 1 on the log scale, with all rows as one family."""
    logs = np.log(table[["ratio", "ci_low", "ci_high"]].to_numpy(float))
    estimate, low, high = logs.T
    p = p_against(estimate, low, high, 0.0, table["units"].to_numpy(float), bootstrap.level)
    q = adjusted(p)
    return table.drop(columns="units").assign(p=p, q=q, survives=q <= 1 - bootstrap.level)


def _turns(bench: Bench, level: str, metric: str) -> np.ndarray:
    """Return amount delivered and seconds of each turn [turn, 2], from the first request sent to the last end."""
    together = bench.meta["measured_with"]
    edges = turn_edges(together["requests"], together["turns"])
    rows = []
    for first, end in pairwise(edges):
        part = [r for r in bench.records if r.level == level and r.phase == "measured" and first <= r.index < end]
        good = [r for r in part if r.outcome == "ok"]
        sent = [r.sent_s for r in part if r.sent_s is not None]
        if sent:
            done = (
                len(good) if metric == "requests_per_s" else sum(output_tokens(r, bench.count_tokens)[0] for r in good)
            )
            rows.append((done, max(r.ended_s for r in part) - min(sent)))
        elif end > first:
            rows.append((np.nan, np.nan))  # a cap stopped the run
    return np.array(rows, float).reshape(-1, 2)


def _reach_of_turns(a: np.ndarray, b: np.ndarray) -> float:
    """Return half the 95 % interval of ln(rate of b / rate of a) over the common turns; NaN for fewer than two."""
    from scipy.special import stdtrit  # imported here because it takes a quarter of a second

    both = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    n = int(both.sum())
    totals = [side[both].sum(0) for side in (a, b)]
    if n < 2 or not all((total > 0).all() for total in totals):
        return np.nan
    of_a, of_b = ((side[both] / total) @ [1.0, -1.0] for side, total in zip((a, b), totals, strict=True))
    spread = np.sqrt(n / (n - 1) * np.square(of_b - of_a).sum())
    return float(stdtrit(n - 1, 0.975) * spread)


def _statistics(values: np.ndarray) -> np.ndarray:
    """Compute STATISTICS over the last axis; the result is [..., statistic]."""
    percentiles = np.percentile(values, [50, 90, 95, 99], axis=-1)
    return np.stack([values.mean(-1), *percentiles], axis=-1)


def _drawn(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute STATISTICS of every resample [resample, statistic] from the weights of the values [resample, value]."""
    n = len(values)
    return _statistics(
        values[np.repeat(np.tile(np.arange(n), len(weights)), weights.astype(int).ravel()).reshape(-1, n)]
    )


def _in_turns(a: Bench, b: Bench) -> bool:
    with_a, with_b = (bench.meta.get("measured_with") or {} for bench in (a, b))
    names, turns = (
        all(with_a.get(key) == with_b.get(key) for key in keys) for keys in (["names"], ["turns", "requests"])
    )
    return bool(with_a) and names and turns and with_a.get("name") != with_b.get("name")


def _remarks(a: Bench, b: Bench, paired: bool, bootstrap: Bootstrap) -> tuple[str, ...]:
    failed = [sum(r.outcome != "ok" and r.phase == "measured" for r in bench.records) for bench in (a, b)]
    how = (
        "Measured in turns: requests of the same number are pairs, of which both must have succeeded; throughput of "
        "the system is paired by turn"
        if paired
        else "Measured one after the other: the ratios include drift between the runs, the intervals do not"
    )
    sides = (f"{name}: {bench.remarks()[0]}" for name, bench in (("a", a), ("b", b)))
    return (
        *sides,
        f"{how}. {bootstrap.level:.0%} intervals over requests; different where a ratio survives control for all "
        f"rows of the table, at a false discovery rate of {1 - bootstrap.level:.2g}.",
        f"Failures, in no ratio: {failed[0]} of a, {failed[1]} of b.",
    )
