"""Data of the benchmark figures: latency distributions, and throughput against latency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mixlens.bench.bench import Bench
from mixlens.bench.metrics import METRICS
from mixlens.errors import BadInput


def distribution(bench: Bench, metric: str, *, level: float = 0.95) -> pd.DataFrame:
    """Compute the empirical distribution of a metric over the measured requests that succeeded, by load.

    F(x) = (number of requests with at most x) / n. The band covers the entire curve simultaneously:
    F(x) +- sqrt(ln(2 / (1 - level)) / 2n) (Dvoretzky-Kiefer-Wolfowitz, with the constant of Massart 1990), assuming
    independent requests.

    Returns
    -------
    DataFrame
        level, value (ascending), fraction, ci_low, ci_high, n; no rows for a load without a value.

    Raises
    ------
    BadInput
        If requests do not have the metric `metric`.
    """
    _known(metric, [name for name in METRICS if name not in ("itl_s", "inter_chunk_s")])
    parts = [pd.DataFrame(columns=["level", "value", "fraction", "ci_low", "ci_high", "n"])]
    measured = bench.requests().query("phase == 'measured'")
    for name, group in measured.groupby("level", sort=False):
        values = np.sort(group[metric].dropna().to_numpy(float))
        n = len(values)
        if not n:
            continue
        fraction, reach = np.arange(1, n + 1) / n, np.sqrt(np.log(2 / (1 - level)) / (2 * n))
        bounds = {"ci_low": np.clip(fraction - reach, 0, 1), "ci_high": np.clip(fraction + reach, 0, 1)}
        parts.append(pd.DataFrame({"level": name, "value": values, "fraction": fraction, **bounds, "n": n}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def throughput_latency(
    bench: Bench, *, metric: str = "ttft_s", statistic: str = "p50", system: str = "output_tokens_per_s"
) -> pd.DataFrame:
    """Tabulate the throughput of every load against the latency of its requests.

    Parameters
    ----------
    bench : Bench
        The benchmark.
    metric, statistic : str, optional
        The latency, from METRICS and STATISTICS.
    system : {"output_tokens_per_s", "requests_per_s"}, optional
        The throughput.

    Returns
    -------
    DataFrame
        level, throughput, throughput_low, throughput_high, latency, latency_low, latency_high, n (successes), failed;
        one row per load, NaN where a metric has no value.

    Raises
    ------
    BadInput
        If a name is unknown.
    """
    _known(metric, list(METRICS))
    _known(system, ["output_tokens_per_s", "requests_per_s"])
    table = bench.table()
    keys = {"throughput": ("system_" + system, "rate"), "latency": (metric, statistic)}
    measured = bench.requests().query("phase == 'measured'")
    rows = []
    for level, group in measured.groupby("level", sort=False):
        row = {"level": level}
        for side, (name, which) in keys.items():
            found = table[(table["level"] == level) & (table["metric"] == name) & (table["statistic"] == which)]
            if found.empty:
                _known(statistic, list(table["statistic"].unique()))
            one = found.iloc[0]
            row |= {side: one["estimate"], f"{side}_low": one["ci_low"], f"{side}_high": one["ci_high"]}
        failed = int((group["outcome"] != "ok").sum())
        rows.append({**row, "n": len(group) - failed, "failed": failed})
    sides = [f"{side}{end}" for side in keys for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["level", *sides, "n", "failed"])


def _known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise BadInput(
            f"Cannot draw {name!r}: benchmarks have no such metric or statistic. Pass one of {', '.join(known)}.",
            argument="curve",
            value=name,
        )
