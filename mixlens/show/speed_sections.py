"""The sections of a report on a benchmark: functions from a Bench to HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from mixlens.bench.bench import Bench
from mixlens.bench.candidates import candidates, frontier
from mixlens.bench.metrics import METRICS
from mixlens.errors import BadInput, MissingSignal
from mixlens.evals.log import Log
from mixlens.show import speed
from mixlens.show.html import bullets, details, escape, paragraphs, picture
from mixlens.show.roofline import roofline

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


def speed_sections(bench: Bench, _name: str = "") -> dict[str, str]:
    """Summary, figures and provenance of a benchmark, by title."""
    return {
        "Speed": _summary(bench),
        "Latency": _latency(bench),
        "Requests": _requests(bench),
        **({"Roofline": _roofline(bench)} if "endpoint" not in bench.meta else {}),
        "Methods and provenance of the benchmark": _provenance(bench),
    }


def tradeoff_sections(runs: Sequence[Log | Bench]) -> dict[str, str]:
    """Quality, cost and speed of models that were evaluated and benchmarked; nothing where no run is of either kind."""
    if len({type(run) for run in runs}) < 2:
        return {}
    title = "Quality, cost and speed"
    try:
        frame = frontier(candidates(runs))
    except BadInput as error:
        return {title: paragraphs(f"Not compared: {error}")}
    text = "Score of the evaluation against the price by the snapshot; area: output speed of the benchmark."
    try:
        figure = picture(speed.quality_cost_speed(frame), text, text)
    except BadInput as error:
        figure = paragraphs(f"Not drawn: {error}")
    return {title: figure + _table(frame, "Candidates, and which no other beats in score, price and speed together")}


def _summary(bench: Bench) -> str:
    overview = bench.overview().reset_index()
    tidy = bench.table()
    return (
        bullets(bench.remarks())
        + _table(overview, "Latency and throughput by load, medians with 95 % intervals")
        + _figure(
            speed.throughput_latency_curve, bench, "Output tokens a second of the system against time to first token."
        )
        + details("All metrics", _table(tidy, "Every metric and statistic, seconds or tokens a second"))
    )


def _latency(bench: Bench) -> str:
    text = "Distribution over requests of time to first token, time per output token and end to end time, by load."
    return _figure(speed.latency_cdfs, bench, text)


def _requests(bench: Bench) -> str:
    text = "Every stream event of the requests of one load: what came before the first token is no token."
    outcomes = _table(bench.outcomes(), "How requests ended")
    rows = bench.requests()
    return (
        _figure(speed.token_timeline, bench, text) + outcomes + details("Requests", _table(rows, "One row a request"))
    )


def _roofline(bench: Bench) -> str:
    text = "Operations a second against operations a byte of every load, under what the device was measured to do."
    return (
        _figure(roofline, bench, text)
        + _table(bench.cold_and_warm(), "First call of each load, and the measured ones; mean times in seconds")
        + _table(bench.peak_memory(), "Most memory that a call held")
        + details("Bytes and operations", _rooflines(bench))
    )


def _rooflines(bench: Bench) -> str:
    try:
        return _table(bench.roofline(), "Every metric of prefill and decode")
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


def _table(frame: pd.DataFrame, caption: str) -> str:
    """A sortable table whose every cell is escaped; n/a for what has no value."""
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in frame.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in frame.itertuples(index=False, name=None))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, float | int):
        return '<td data-v="">n/a</td>' if value != value else f'<td data-v="{value:.6g}">{value:.6g}</td>'
    return f"<td>{escape(value)}</td>"
