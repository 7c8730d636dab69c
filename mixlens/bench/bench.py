"""Bench: a finished benchmark, in memory or from a run directory, with metrics computed from its records."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import pandas as pd
import xarray as xr

from mixlens.bench import local_tables, metrics, shares
from mixlens.bench.events import Record, read_records, records_bytes
from mixlens.bench.metrics import CountTokens, Limits
from mixlens.bench.prompts import workload_words
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.files import write_file
from mixlens.core.run_dir import open_run
from mixlens.core.text import interval_of
from mixlens.errors import visible
from mixlens.trace.trace import Trace

RESULTS = "results.jsonl"
ROUTING = "routing"  # folder of the routing that the server returned
# Columns of the overview: heading, metric, statistic, factor, decimals.
_OVERVIEW = (
    ("TTFT p50 [ms]", "ttft_s", "p50", 1e3, 0),
    ("TTFT p95 [ms]", "ttft_s", "p95", 1e3, 0),
    ("TPOT p50 [ms]", "tpot_s", "p50", 1e3, 1),
    ("end to end p50 [s]", "e2e_token_s", "p50", 1.0, 2),
    ("a request [tok/s]", "output_tokens_per_s", "p50", 1.0, 1),
)
_UNFINISHED = (
    "Without a finish reason, which others have: {} of {} successes. The server may have cut them off, which makes "
    "their end-to-end times too short."
)
_SYSTEM = (("system [tok/s]", "output_tokens_per_s"), ("system [requests/s]", "requests_per_s"))


class Bench:
    """The records of a benchmark and the metrics computed from them.

    `ml.benchmark` returns a Bench, and `ml.open` reads one from a run directory.

    Parameters
    ----------
    records : Sequence[Record]
        All requests, including warm-up requests and failures.
    meta : dict[str, Any]
        Endpoint or model, load, versions, date, and the reason if the run stopped early.
    path : Path, optional
        Run directory; None for a benchmark in memory.
    count_tokens : CountTokens, optional
        Function that counts the tokens of a text, used if the server reports no usage. Run directories do not store
        it.

    Examples
    --------
    >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
    >>> bench = ml.benchmark(model, requests=2, workload=ml.bench.Workload(16, 2), settings=settings)
    >>> bench.outcomes()["n"].tolist()
    [2]
    """

    kind = "bench"

    def __init__(
        self,
        records: Sequence[Record],
        meta: dict[str, Any],
        *,
        path: Path | None = None,
        count_tokens: CountTokens | None = None,
    ) -> None:
        self.records, self.meta, self.path, self.count_tokens = list(records), meta, path, count_tokens
        self.routing: Trace | None = None  # set for Endpoint(routing=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Bench:
        """Open the benchmark in a run directory.

        Parameters
        ----------
        path : str or os.PathLike
            Run directory.
        check : bool, optional
            Whether to verify the checksum of every file when it is first read; False compares sizes only.

        Returns
        -------
        Bench

        Raises
        ------
        RunError
            If `path` holds no run or a run of another kind.

        Examples
        --------
        >>> ml.bench.Bench.open("runs/vllm")  # doctest: +SKIP
        """
        run = open_run(path, "bench", check=check)
        bench = cls(list(read_records(run.file(RESULTS))), run.meta, path=run.path)
        if (routing := run.nested(ROUTING)) is not None:
            bench.routing = Trace.open(routing, check=check)
        return bench

    @property
    def succeeded(self) -> int:
        """Number of measured requests that succeeded."""
        return sum(record.outcome == "ok" for record in self.records if record.phase == "measured")

    def requests(self) -> pd.DataFrame:
        """Tabulate the requests.

        A failed request has NaN for every metric. TPOT and output speed need at least two events that carry tokens.

        Returns
        -------
        DataFrame
            One row per request: level, index, phase, outcome, tokens and metrics.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=2, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.requests()["output_tokens"].tolist()
        [2, 2]
        """
        return metrics.request_table(self.records, self.count_tokens)

    def summary(self, *, bootstrap: Bootstrap = DEFAULT) -> xr.Dataset:
        """Compute mean and percentiles of every metric over the measured requests that succeeded.

        Percentiles interpolate linearly between order statistics, which also bound them; means have the bounds of a
        gamma distribution over requests. The 99th percentile is NaN below 100 samples.

        Parameters
        ----------
        bootstrap : Bootstrap, optional
            Settings of the intervals.

        Returns
        -------
        xarray.Dataset
            ``estimate, ci_low, ci_high, n, n_requests`` [level, metric, statistic]; NaN for a level without a success.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=2, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.summary()["estimate"].dims
        ('level', 'metric', 'statistic')
        """
        return metrics.summary(self.records, count_tokens=self.count_tokens, bootstrap=bootstrap)

    def throughput(self) -> pd.DataFrame:
        """Compute the throughput of the whole system at each level.

        The window runs from the first measured request sent to the end of the last one. Tokens of failed requests do
        not count. The interval is a t interval over the rates of ten slices of the window (batch means).

        Returns
        -------
        DataFrame
            level, metric (output_tokens_per_s, requests_per_s), estimate, ci_low, ci_high, n (successes), window_s.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=2, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.throughput()["metric"].tolist()
        ['output_tokens_per_s', 'requests_per_s']
        """
        return metrics.throughput(self.records, count_tokens=self.count_tokens)

    def goodput(self, limits: Limits) -> pd.DataFrame:
        """Compute the share and the rate of measured requests that meet every limit.

        Parameters
        ----------
        limits : Limits
            Latency limits.

        Returns
        -------
        DataFrame
            level, good (requests), good_frac, ci_low, ci_high (of good_frac: 95 %, Clopper and Pearson), good_per_s, n
            (measured requests); NaN for a level without a success.

        Raises
        ------
        BadInput
            If `limits` sets no limit.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=2, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.goodput(ml.bench.Limits(ttft_s=60.0))["good"].tolist()
        [2]
        """
        return metrics.goodput(self.records, limits, count_tokens=self.count_tokens)

    def events(self) -> pd.DataFrame:
        """Tabulate the events of all streams.

        Returns
        -------
        DataFrame
            One row per event: level, index, phase, at_s (seconds since the request was sent), kind, text, finish.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.events()["kind"].tolist()
        ['token', 'token']
        """
        rows = [
            (
                r.level,
                r.index,
                r.phase,
                e.at_s - (r.started_s if r.sent_s is None else r.sent_s),
                e.kind,
                e.text,
                e.finish,
            )
            for r in self.records
            for e in r.events
        ]
        return pd.DataFrame(rows, columns=["level", "index", "phase", "at_s", "kind", "text", "finish"])

    def to_jsonl(self, path: str | os.PathLike[str]) -> Path:
        """Write all records to a JSON Lines file, one request per line, in the format of a run directory.

        Parameters
        ----------
        path : str or os.PathLike
            File to write.

        Returns
        -------
        Path
            The file written.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.to_jsonl(tmp / "results.jsonl").name
        'results.jsonl'
        """
        return write_file(path, records_bytes(self.records))

    def roofline(self, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
        """Compare the prefill and decode of a loaded model with the measured limits of its device.

        Parameters
        ----------
        bootstrap : Bootstrap, optional
            Settings of the intervals.

        Returns
        -------
        DataFrame
            level, phase, metric, estimate, ci_low, ci_high, n (calls).

        Raises
        ------
        MissingSignal
            If the benchmark is of an endpoint, whose device is unknown.

        Examples
        --------
        >>> bench = ml.benchmark(ml.load("demo"), concurrency=[1, 4], requests=4)  # doctest: +SKIP
        >>> bench.roofline()  # doctest: +SKIP
        """
        return local_tables.rooflines(self.records, self.meta, bootstrap=bootstrap)

    def configurations(self) -> dict[str, Bench]:
        """Split a benchmark of several configurations into one Bench per configuration.

        Returns
        -------
        dict[str, Bench]
            The configurations that ran, by name; {"": self} for a benchmark of a single configuration.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> list(bench.configurations())
        ['']
        """
        if "configurations" not in self.meta:
            return {"": self}
        parts = local_tables.parts(self.records, self.meta)
        return {label: Bench(records, meta) for label, (records, meta) in parts.items()}

    def cold_and_warm(self, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
        """Compare the first call of each load with its measured calls.

        The first warm-up call includes one-time work such as compilation.

        Parameters
        ----------
        bootstrap : Bootstrap, optional
            Settings of the intervals.

        Returns
        -------
        DataFrame
            level, state (cold, warm), metric (ttft_s, tpot_s, e2e_token_s), estimate (mean), ci_low, ci_high,
            n (calls). NaN without a successful call; bounds are NaN for a single call.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=1, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.cold_and_warm()["state"].unique().tolist()
        ['cold', 'warm']
        """
        return local_tables.cold_and_warm(self.records, bootstrap=bootstrap)

    def peak_memory(self) -> pd.DataFrame:
        """Return the largest amount of memory that a call of each load held.

        Returns
        -------
        DataFrame
            level, memory (peak_vram_bytes or peak_rss_bytes), bytes, n (calls).

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.peak_memory().columns.tolist()
        ['level', 'memory', 'bytes', 'n']
        """
        return local_tables.peak_memory(self.records)

    def outcomes(self) -> pd.DataFrame:
        """Count the requests by outcome.

        Returns
        -------
        DataFrame
            level, phase, outcome, status, n; one row per combination that occurred.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.outcomes()["outcome"].tolist()
        ['ok']
        """
        return metrics.outcomes(self.records)

    def table(self, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
        """Return all metrics with interval and n in tidy form.

        Metrics of the whole system have the prefix ``system_`` and the statistic "rate".

        Parameters
        ----------
        bootstrap : Bootstrap, optional
            Settings of the intervals.

        Returns
        -------
        DataFrame
            level, metric, statistic, estimate, ci_low, ci_high, n; NaN where a metric has no value.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.table()["statistic"].unique().tolist()
        ['mean', 'p50', 'p90', 'p95', 'p99', 'rate']
        """
        columns = ["level", "metric", "statistic", "estimate", "ci_low", "ci_high", "n"]
        requests = self.summary(bootstrap=bootstrap).to_dataframe().reset_index()
        system = self.throughput()
        system = system.assign(metric="system_" + system["metric"], statistic="rate")
        return pd.concat(
            [part[columns] for part in (requests, system) if len(part)] or [requests[columns]]
        ).reset_index(drop=True)

    def overview(self) -> pd.DataFrame:
        """Summarize each load as text.

        Returns
        -------
        DataFrame
            One row per load: number of successes, latencies and rates with intervals.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.overview()["succeeded"].tolist()
        ['1 of 1']
        """
        numbers = {(r["level"], r["metric"], r["statistic"]): r for r in self.table().to_dict("records")}
        rows = {}
        for level, group in self.requests().query("phase == 'measured'").groupby("level", sort=False):
            row = {"succeeded": f"{(group['outcome'] == 'ok').sum()} of {len(group)}"}
            for heading, metric, statistic, factor, decimals in _OVERVIEW:
                row[heading] = interval_of(numbers[level, metric, statistic], factor, decimals)
            for heading, metric in _SYSTEM:
                row[heading] = interval_of(numbers[level, "system_" + metric, "rate"], 1.0, 2)
            rows[level] = row
        for level, told in local_tables.columns(self.records, self.meta).items():
            rows[level] |= told
        return pd.DataFrame.from_dict(rows, orient="index").fillna("n/a").rename_axis("load")

    def remarks(self) -> list[str]:
        """Return the remarks that qualify the numbers.

        Returns
        -------
        list[str]
            Sentences on the target, the source of the token counts, warm-up requests, failures, and why the run
            stopped early.

        Examples
        --------
        >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
        >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
        >>> bench.remarks()[-1]
        'Failures, in no number: none.'
        """
        sources = metrics.token_sources(self.records, self.count_tokens)
        counted = ", ".join(f"{name} ({n} requests)" for name, n in sources.items()) or "n/a, no request succeeded"
        warm = [record for record in self.records if record.phase == "warm-up"]
        failed = Counter((r.outcome, r.phase) for r in self.records if r.outcome != "ok")
        told = [f"{n} {outcome} ({phase})" for (outcome, phase), n in failed.items()]
        several = any(r.level.startswith("concurrency") and r.level != "concurrency 1" for r in warm)
        ramp = "; the slots of a load then fill over the duration of one of them" if several else ""
        if "endpoint" not in self.meta:
            where = local_tables.remarks(self.meta)
        else:
            where = [f"{self.meta['endpoint']['model']} at {self.meta['endpoint']['url']}, {self.meta['created']}."]
            where += [f"Workload: {workload_words(self.meta['workload'])}."] if self.meta.get("workload") else []
        return [
            *where,
            f"Token counts from: {counted}. Intervals: {DEFAULT.level:.0%}.",
            *(shares.shares(self.records, self.meta["endpoint"]["model"]) if "endpoint" in self.meta else []),
            f"Warm-up, in no number: {len(warm)} requests{_first_answer(warm, self.count_tokens)}{ramp}.",
            f"Failures, in no number: {', '.join(told) or 'none'}.",
            *local_tables.failures(self.records),
            *([_UNFINISHED.format(cut, self.succeeded)] if (cut := shares.unfinished(self.records)) else []),
            *([f"Stopped early by {self.meta['stopped']}."] if self.meta.get("stopped") else []),
        ]

    def __repr__(self) -> str:
        width = max(get_terminal_size().columns, 100)
        table = self.overview().T.to_string(line_width=width) if self.records else "no requests"
        return visible("\n".join([table, *self.remarks()]))

    def _repr_html_(self) -> str:
        said = "".join(f"<div>{html.escape(remark)}</div>" for remark in self.remarks())
        return f"<div class='mixlens-bench'>{self.overview().to_html(border=0)}{said}</div>"


def _first_answer(warm: Sequence[Record], count_tokens: CountTokens | None) -> str:
    """Format the time to first token of the first warm-up request; "" without one."""
    first = metrics.request_table(warm, count_tokens)["ttft_s"].dropna()
    return f", the first with TTFT {first.iloc[0] * 1e3:.0f} ms" if len(first) else ""
