"""Bench: a finished benchmark, from memory or from its run directory; every number is computed from its records."""

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

from mixlens.bench import local_tables, metrics
from mixlens.bench.events import Record, read_records, write_records
from mixlens.bench.metrics import CountTokens, Limits
from mixlens.bench.prompts import workload_words
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.run_dir import open_run
from mixlens.core.text import interval_of
from mixlens.errors import RunError

RESULTS = "results.jsonl"
# Columns of the overview: heading, metric and statistic, factor, decimals.
_OVERVIEW = (
    ("TTFT p50 [ms]", "ttft_s", "p50", 1e3, 0),
    ("TTFT p95 [ms]", "ttft_s", "p95", 1e3, 0),
    ("TPOT p50 [ms]", "tpot_s", "p50", 1e3, 1),
    ("end to end p50 [s]", "e2e_token_s", "p50", 1.0, 2),
    ("a request [tok/s]", "output_tokens_per_s", "p50", 1.0, 1),
)
_UNFINISHED = (
    "Without a finish reason, which others have: {} of {} successes. The server may have broken them off, and end "
    "to end is then too short."
)
_SYSTEM = (("system [tok/s]", "output_tokens_per_s"), ("system [requests/s]", "requests_per_s"))


class Bench:
    """The records of a benchmark's requests, and the metrics computed from them.

    Parameters
    ----------
    records : Sequence[Record]
        Every request, warm-up and failures among them.
    meta : dict[str, Any]
        Endpoint, load, versions, date; what stopped the run, if something did.
    path : Path, optional
        Of the run directory, None in memory.
    count_tokens : CountTokens, optional
        Counts answers whose server reports no usage; not kept on disk.
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

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Bench:
        """Open the benchmark in a folder. Raises RunError where there is none, or a run of another kind.

        Parameters
        ----------
        path : str or os.PathLike
            The folder.
        check : bool, optional
            Compare every file with its checksum when it is first read; False compares sizes only.
        """
        run = open_run(path, check=check)
        if run.kind != "bench":
            raise RunError(
                f"Cannot open a benchmark at {path}: the run there is of kind {run.kind}. Use mixlens.open, which "
                "opens a run of any kind.",
                argument="path",
                value=run.kind,
            )
        return cls(list(read_records(run.file(RESULTS))), run.meta, path=run.path)

    @property
    def succeeded(self) -> int:
        """Return how many measured requests succeeded."""
        return sum(record.outcome == "ok" for record in self.records if record.phase == "measured")

    def requests(self) -> pd.DataFrame:
        """Return one row per request."""
        return metrics.request_table(self.records, self.count_tokens)

    def summary(self, *, bootstrap: Bootstrap = DEFAULT) -> xr.Dataset:
        """Return mean and percentiles of every metric, with intervals.

        Parameters
        ----------
        bootstrap : Bootstrap, optional
            How intervals are computed.
        """
        return metrics.summary(self.records, count_tokens=self.count_tokens, bootstrap=bootstrap)

    def throughput(self) -> pd.DataFrame:
        """Return the throughput of the whole system."""
        return metrics.throughput(self.records, count_tokens=self.count_tokens)

    def goodput(self, limits: Limits) -> pd.DataFrame:
        """Return the goodput under the given limits.

        Parameters
        ----------
        limits : Limits
            Limits that a request must keep.
        """
        return metrics.goodput(self.records, limits, count_tokens=self.count_tokens)

    def events(self) -> pd.DataFrame:
        """Return one row per stream event: level, index, phase, at_s (seconds after sent), kind, text, finish."""
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
        """Write every record to one file of JSON Lines, one request per line, as in a run directory.

        Parameters
        ----------
        path : str or os.PathLike
            The folder.
        """
        write_records(path, self.records)
        return Path(path)

    def roofline(self, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
        """Return the roofline of a loaded model. Raises MissingSignal for an endpoint.

        Parameters
        ----------
        bootstrap : Bootstrap, optional
            How intervals are computed.
        """
        return local_tables.rooflines(self.records, self.meta, bootstrap=bootstrap)

    def configurations(self) -> dict[str, Bench]:
        """Return each configuration that ran as a benchmark of its own, by name; {"": self} where there is only one."""
        if "configurations" not in self.meta:
            return {"": self}
        parts = local_tables.parts(self.records, self.meta)
        return {label: Bench(records, meta) for label, (records, meta) in parts.items()}

    def cold_and_warm(self, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
        """Return the first call and the measured calls of each load.

        Parameters
        ----------
        bootstrap : Bootstrap, optional
            How intervals are computed.
        """
        return local_tables.cold_and_warm(self.records, bootstrap=bootstrap)

    def peak_memory(self) -> pd.DataFrame:
        """Return the peak memory of a loaded model, by load."""
        return local_tables.peak_memory(self.records)

    def outcomes(self) -> pd.DataFrame:
        """Return how requests ended."""
        return metrics.outcomes(self.records)

    def table(self, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
        """Return every number with interval and n in tidy form.

        Those of the whole system have the prefix ``system_`` and the statistic "rate".


        Parameters
        ----------
        bootstrap : Bootstrap, optional
            How intervals are computed.

        Returns
        -------
        DataFrame
            Level, metric, statistic, estimate, ci_low, ci_high, n; NaN for what has no value.
        """
        columns = ["level", "metric", "statistic", "estimate", "ci_low", "ci_high", "n"]
        requests = self.summary(bootstrap=bootstrap).to_dataframe().reset_index()
        system = self.throughput()
        system = system.assign(metric="system_" + system["metric"], statistic="rate")
        return pd.concat(
            [part[columns] for part in (requests, system) if len(part)] or [requests[columns]]
        ).reset_index(drop=True)

    def overview(self) -> pd.DataFrame:
        """Return one row per load, as text: requests that succeeded, latencies and rates with intervals."""
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
        """Return the remarks that belong to the numbers: source of token counts, warm-up, failures, what stopped the
        run.
        """
        sources = metrics.token_sources(self.records, self.count_tokens)
        counted = ", ".join(f"{name} ({n} requests)" for name, n in sources.items()) or "n/a, no request succeeded"
        warm = [record for record in self.records if record.phase == "warm-up"]
        failed = Counter((r.outcome, r.phase) for r in self.records if r.outcome != "ok")
        told = [f"{n} {outcome} ({phase})" for (outcome, phase), n in failed.items()]
        if "endpoint" not in self.meta:
            where = local_tables.remarks(self.meta)
        else:
            where = [f"{self.meta['endpoint']['model']} at {self.meta['endpoint']['url']}, {self.meta['created']}."]
            where += [f"Workload: {workload_words(self.meta['workload'])}."] if self.meta.get("workload") else []
        return [
            *where,
            f"Token counts from: {counted}. Intervals: {DEFAULT.level:.0%}.",
            f"Warm-up, in no number: {len(warm)} requests{_first_answer(warm, self.count_tokens)}.",
            f"Failures, in no number: {', '.join(told) or 'none'}.",
            *local_tables.failures(self.records),
            *([_UNFINISHED.format(cut, self.succeeded)] if (cut := metrics.unfinished(self.records)) else []),
            *([f"Stopped early by {self.meta['stopped']}."] if self.meta.get("stopped") else []),
        ]

    def __repr__(self) -> str:
        width = max(get_terminal_size().columns, 100)
        table = self.overview().T.to_string(line_width=width) if self.records else "no requests"
        return "\n".join([table, *self.remarks()])

    def _repr_html_(self) -> str:
        said = "".join(f"<div>{html.escape(remark)}</div>" for remark in self.remarks())
        return f"<div class='mixlens-bench'>{self.overview().to_html(border=0)}{said}</div>"


def _first_answer(warm: Sequence[Record], count_tokens: CountTokens | None) -> str:
    first = metrics.request_table(warm, count_tokens)["ttft_s"].dropna()
    return f", the first with TTFT {first.iloc[0] * 1e3:.0f} ms" if len(first) else ""
