"""Sections of a report on a benchmark."""

from __future__ import annotations

import json

from mixlens.bench import figures
from mixlens.bench.bench import Bench
from mixlens.bench.metrics import METRICS
from mixlens.bench.roofline_figure import roofline
from mixlens.core.text import interval_of
from mixlens.errors import BadInput, MissingSignal
from mixlens.plot.html import bullets, details, escape, frame_table, paragraphs, picture

_PROVENANCE = (
    "created",
    "endpoint",
    "workload",
    "model",
    "machine",
    "local",
    "configurations",
    "price_usd_per_mtok",
    "stopped",
    "counts",
    "versions",
)
# Findings of a benchmark: heading of the section, metric, statistic, name, unit, factor, decimals.
_FOUND = (
    ("Latency", "ttft_s", "p50", "Median time to the first token", "ms", 1e3, 0),
    ("Latency", "tpot_s", "p50", "Median time per output token after the first", "ms", 1e3, 1),
    ("Latency", "e2e_token_s", "p50", "Median time to the last token", "s", 1.0, 2),
    ("Speed", "system_output_tokens_per_s", "rate", "Output of the whole system", "tokens per second", 1.0, 1),
)


def speed_sections(bench: Bench, _name: str = "") -> dict[str, str]:
    """Return summary, figures and provenance of a benchmark as HTML, by title."""
    return {
        "Speed": _summary(bench),
        "Latency": _latency(bench),
        "Requests": _requests(bench),
        **({"Roofline": _roofline(bench)} if "endpoint" not in bench.meta else {}),
        "Methods and provenance of the benchmark": _provenance(bench),
    }


def speed_findings(bench: Bench) -> list[tuple[str, str]]:
    """Return the lowest and highest median latencies and throughput over loads, with section headings."""
    table = bench.table()
    said = []
    for heading, metric, statistic, name, unit, factor, decimals in _FOUND:
        chosen = table[(table["metric"] == metric) & (table["statistic"] == statistic)].dropna(subset=["estimate"])
        rows = sorted(chosen.to_dict("records"), key=lambda row: row["estimate"])
        if not rows:
            continue
        told = [
            f"{interval_of(row, factor, decimals)} {unit} at {row['level']} (n = {int(row['n']):,} requests)"
            for row in ([rows[0], rows[-1]] if len(rows) > 1 else rows)
        ]
        said.append((heading, f"{name}: {' to '.join(told)}."))
    measured = [record for record in bench.records if record.phase == "measured"]
    if failed := len(measured) - bench.succeeded:
        said.append(
            ("Requests", f"{failed:,} of {len(measured):,} measured requests failed; no other number includes them.")
        )
    return said


def _summary(bench: Bench) -> str:
    overview = bench.overview().reset_index()
    tidy = bench.table()
    return (
        bullets(bench.remarks())
        + frame_table(overview, "Latency and throughput by load, medians with 95 % intervals")
        + _figure(
            figures.throughput_latency_curve,
            bench,
            "Output tokens per second of the system against time to first token.",
        )
        + details("All metrics", frame_table(tidy, "Every metric and statistic, seconds or tokens per second"))
    )


def _latency(bench: Bench) -> str:
    text = "Distribution over requests of time to first token, time per output token and end to end time, by load."
    return _figure(figures.latency_cdfs, bench, text)


def _requests(bench: Bench) -> str:
    text = "Every stream event of the requests of one load: events before the first token are not tokens."
    outcomes = frame_table(bench.outcomes(), "How requests ended")
    rows = bench.requests()
    return (
        _figure(figures.token_timeline, bench, text)
        + outcomes
        + details("Requests", frame_table(rows, "One row per request"))
    )


def _roofline(bench: Bench) -> str:
    text = "Operations per second against operations per byte of every load, below the measured limits of the device."
    return (
        _figure(roofline, bench, text)
        + frame_table(bench.cold_and_warm(), "First call and measured calls of each load; mean times in seconds")
        + frame_table(bench.peak_memory(), "Peak memory of a call")
        + details("Bytes and operations", _rooflines(bench))
    )


def _rooflines(bench: Bench) -> str:
    try:
        return frame_table(bench.roofline(), "Every metric of prefill and decode")
    except MissingSignal as error:
        return paragraphs(str(error))


def _provenance(bench: Bench) -> str:
    meta = {name: bench.meta[name] for name in _PROVENANCE if name in bench.meta}
    formulas = [f"{name}: {what}" for name, what in METRICS.items()]
    kept = f"<pre>{escape(json.dumps(meta, indent=1, ensure_ascii=False))}</pre>"
    return bullets(formulas) + details("Settings and versions", kept)


def _figure(draw, bench: Bench, text: str) -> str:
    try:
        return picture(draw(bench), text, text)
    except (BadInput, MissingSignal) as error:
        return paragraphs(f"Not drawn: {error}")
