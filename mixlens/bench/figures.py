"""Figures of benchmarks: latency distributions, throughput against latency, and the token timeline.

Every function takes a Bench and `ax`, and returns the Axes; grids return a Figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixlens.bench.bench import Bench
from mixlens.bench.curves import distribution, throughput_latency
from mixlens.bench.events import Record
from mixlens.endpoints.protocols import COMMENT, DONE, ERROR, MALFORMED, ROLE, TOKEN, USAGE
from mixlens.errors import BadInput
from mixlens.plot.checks import takes_run
from mixlens.plot.colours import SERIES_COLOURS, series_colours
from mixlens.plot.style import (
    COLUMN,
    INK,
    MARKERS,
    MUTED,
    PAGE,
    add_axes,
    drawing,
    drop_note,
    heading,
    in_legend,
    legend_below,
    name_points,
    paper,
    paper_figure,
    percent,
    printable,
    relative_size,
)

_NAMES = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "inter_chunk_s": "time between chunks",
    "itl_s": "time between tokens",
    "e2e_token_s": "end to end, to the last token",
    "e2e_stream_s": "end to end, to the end of the stream",
    "scheduled_ttft_s": "due to first token",
    "scheduled_e2e_s": "due to last token",
    "connect_s": "opening a connection",
    "headers_s": "time to headers",
    "output_tokens_per_s": "output tokens per second",
    "requests_per_s": "requests per second",
}
# Marks of the timeline: kind of event, marker, size in points, label.
_EVENTS = (
    (COMMENT, ".", 3, "comment"),
    (ROLE, "|", 6, "role chunk, no token"),
    (TOKEN, "o", 2.4, "token chunk"),
    (USAGE, "D", 2.6, "usage"),
    (DONE, "s", 2.6, "end"),
)
_MOST_ROWS = 24
_FAULT = "#b3261e"  # for failed requests; readable as text


@takes_run("benchmark", "requests", "records")
def latency_cdf(bench: Bench, ax: Axes | None = None, *, metric: str = "ttft_s", title: str | None = None) -> Axes:
    """Draw the distribution of a latency over requests: one curve per load, with a confidence band.

    The band covers the whole curve simultaneously at 95 % (Dvoretzky-Kiefer-Wolfowitz).

    Parameters
    ----------
    bench : Bench
        Needs at least one measured request that succeeded.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    metric : str, optional
        "ttft_s", "tpot_s", "e2e_token_s" or another per-request column of ``mixlens.bench.metrics.METRICS``.
    title : str, optional
        Title. By default the main finding, if one was computed, or a description of the figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `bench` is no benchmark, or no request has a value of the metric.

    Examples
    --------
    >>> bench = ml.open("runs/vllm")  # doctest: +SKIP
    >>> ml.show.latency_cdf(bench, metric="ttft_s").get_xlabel()  # doctest: +SKIP
    'time to first token [ms]'
    """
    data = distribution(bench, metric)
    if data.empty:
        raise BadInput(
            f"Cannot draw the distribution of {_NAMES[metric]}: no measured request that succeeded has a value. "
            "See bench.outcomes(), or draw another metric.",
            argument="metric",
            value=metric,
        )
    factor, unit = _scale(metric, data["value"].max())
    levels = list(dict.fromkeys(data["level"]))
    width = COLUMN if max(map(len, levels)) < 25 else COLUMN * 1.35
    with drawing(ax, width, 2.5 + 0.14 * len(levels)) as ax:
        for colour, level in zip(series_colours(len(levels)), levels, strict=True):
            part = data[data["level"] == level]
            x = np.r_[part["value"].iloc[0], part["value"]] * factor
            label = f"{level} (n = {len(part)})"
            ax.step(x, np.r_[0, part["fraction"]], where="post", color=colour, label=in_legend(label))
            ax.fill_between(
                part["value"] * factor, part["ci_low"], part["ci_high"], step="post", color=colour, alpha=0.15, lw=0
            )
        ax.set_ylim(0, 1.02)
        ax.set_xlim(left=0)
        ax.yaxis.set_major_formatter(percent)
        ax.set_ylabel("share of requests")
        ax.set_xlabel(f"{_NAMES[metric]} [{unit}]")
        legend_below(ax)
        heading(
            ax,
            title or _NAMES[metric].capitalize(),
            f"{_whose(bench)}; bands: 95 % for the whole curve (DKW); {_lost(bench)}",
        )
    return ax


@takes_run("benchmark", "requests", "records")
def latency_cdfs(
    bench: Bench, *, metrics: Sequence[str] = ("ttft_s", "tpot_s", "e2e_token_s"), title: str | None = None
) -> Figure:
    """Draw `latency_cdf` of several metrics side by side, leaving out metrics without a value.

    Parameters
    ----------
    bench : Bench
        Needs at least one measured request that succeeded.
    metrics : sequence of str, optional
        As in `latency_cdf`.
    title : str, optional
        Title. By default the main finding, if one was computed, or a description of the figure.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    BadInput
        If `bench` is no benchmark, or no request has a value of any metric.

    Examples
    --------
    >>> bench = ml.open("runs/vllm")  # doctest: +SKIP
    >>> len(ml.show.latency_cdfs(bench).axes)  # doctest: +SKIP
    3
    """
    present = [metric for metric in metrics if not distribution(bench, metric).empty]
    if not present:
        raise BadInput(
            f"Cannot draw the distributions of {', '.join(metrics)}: no measured request that succeeded has a value. "
            "See bench.outcomes().",
            argument="metrics",
            value=list(metrics),
        )
    with paper():
        levels = len(set(distribution(bench, present[0])["level"]))
        figure = paper_figure(PAGE, 2.6 + 0.1 * levels)
        for at, metric in enumerate(present):
            ax = latency_cdf(bench, add_axes(figure, 1, len(present), at + 1), metric=metric)
            drop_note(ax, _NAMES[metric].split(",")[0])
            if at:
                ax.set_ylabel("")
            if legend := ax.get_legend():
                legend.remove()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, _columns(labels, 110)))
        note = f"{_whose(bench)}; bands: 95 % for the whole curve (DKW); {_lost(bench)}"
        note = f"{title}. {note}" if title else note
        figure.suptitle(printable(note), fontsize=relative_size(0.8), color=MUTED, x=0.01, ha="left")
    return figure


def throughput_latency_curve(
    benches: Bench | Sequence[Bench],
    ax: Axes | None = None,
    *,
    metric: str = "ttft_s",
    statistic: str = "p50",
    title: str | None = None,
) -> Axes:
    """Draw system throughput against request latency, one point per load.

    Parameters
    ----------
    benches : Bench or sequence of Bench
        One benchmark or several, labelled by endpoint and model. A benchmark of several configurations has one line per
        configuration.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    metric, statistic : str, optional
        Latency metric and statistic, from ``METRICS`` and ``STATISTICS`` in ``mixlens.bench.metrics``.
    title : str, optional
        Title. By default the main finding, if one was computed, or a description of the figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `benches` holds anything else, or no load has both a throughput and a latency.

    Examples
    --------
    >>> bench = ml.open("runs/vllm")  # doctest: +SKIP
    >>> ax = ml.show.throughput_latency_curve(bench, statistic="p95")  # doctest: +SKIP
    >>> ax.get_xlabel()  # doctest: +SKIP
    'output tokens per second, all requests together'
    """
    given = list(benches) if isinstance(benches, Sequence) else [benches]
    if wrong := [one for one in given if not isinstance(one, Bench)]:
        raise BadInput(
            f"Cannot draw throughput_latency_curve: expected benchmarks, got {type(wrong[0]).__name__}. Pass what "
            "ml.benchmark returns, or a list of several.",
            argument="benches",
            value=type(wrong[0]).__name__,
        )
    named = [
        (name if name and len(given) == 1 else ", ".join(filter(None, (_whose(part), name))), part)
        for bench in given
        for name, part in bench.configurations().items()
    ]
    several = [part for _, part in named]
    tables = [throughput_latency(bench, metric=metric, statistic=statistic) for bench in several]
    largest = max((table["latency"].max() for table in tables), default=np.nan)
    if not largest == largest:
        raise BadInput(
            "Cannot draw throughput against latency: no load has both. See bench.outcomes() and bench.overview().",
            argument="benches",
            value=0,
        )
    factor, unit = _scale(metric, largest)
    short = _short([level for table in tables for level in table["level"]])
    with drawing(ax, COLUMN * 1.25, 2.7 + 0.14 * len(several)) as ax:
        points: list[tuple[float, float, str]] = []
        for i, ((name, _), table) in enumerate(zip(named, tables, strict=True)):
            colour = series_colours(len(several))[i]
            x, y = table["throughput"], table["latency"] * factor
            ax.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], label=in_legend(name))
            ax.hlines(y, table["throughput_low"], table["throughput_high"], color=colour, lw=0.7)
            ax.vlines(x, table["latency_low"] * factor, table["latency_high"] * factor, color=colour, lw=0.7)
            known = x.notna() & y.notna()
            points += [(x[at], y[at], short[level]) for at, level in table["level"][known].items()]
        ax.margins(x=0.12)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        name_points(ax, points, relative_size(0.75))
        ax.set_xlabel("output tokens per second, all requests together")
        ax.set_ylabel(f"{_NAMES[metric]}, {statistic} [{unit}]")
        if len(several) > 1:
            legend_below(ax, columns=1)
        n = " + ".join(str(int(table["n"].sum())) for table in tables)
        source = _whose(given[0]) if len(given) == 1 else f"{len(several)} benchmarks"
        heading(
            ax, title or "Throughput against latency", f"{source}; n = {n} requests; whiskers: 95 %; {_lost(*given)}"
        )
    return ax


@takes_run("benchmark", "requests", "records")
def token_timeline(
    bench: Bench, ax: Axes | None = None, *, level: str | None = None, most: int = _MOST_ROWS, title: str | None = None
) -> Axes:
    """Draw every event of every measured request of a load against time.

    Parameters
    ----------
    bench : Bench
        Needs at least one measured request.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    level : str, optional
        Name of the load. By default the first load.
    most : int, optional
        Maximum number of requests; the first ones are drawn.
    title : str, optional
        Title. By default the main finding, if one was computed, or a description of the figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `bench` is no benchmark, or does not have the load.

    Examples
    --------
    >>> bench = ml.open("runs/vllm")  # doctest: +SKIP
    >>> ml.show.token_timeline(bench).get_ylabel()  # doctest: +SKIP
    'request'
    """
    measured = [record for record in bench.records if record.phase == "measured"]
    levels = list(dict.fromkeys(record.level for record in measured))
    level = levels[0] if level is None and levels else level
    shown = [record for record in measured if record.level == level]
    if not shown:
        raise BadInput(
            f"Cannot draw the timeline of load {level!r}: the benchmark's loads are {', '.join(levels) or 'none'}. "
            "Pass level= the name of one of them.",
            argument="level",
            value=level,
        )
    n, shown = len(shown), sorted(shown, key=lambda record: record.started_s)[:most]
    zero = shown[0].started_s
    with drawing(ax, PAGE * 0.9, 1.2 + 0.13 * len(shown)) as ax:
        for row, record in enumerate(shown):
            _timeline_row(ax, row, record, zero)
        for kind, marker, size, label in _EVENTS:
            at = [(e.at_s - zero, row) for row, record in enumerate(shown) for e in record.events if e.kind == kind]
            if at:
                colour = SERIES_COLOURS[0] if kind == TOKEN else INK
                # Kinds without events would leave an empty entry in the legend.
                ax.plot(*np.array(at).T, marker, ms=size, color=colour, mew=0.6, label=label, linestyle="", zorder=3)
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.set_yticks([0, len(shown) - 1] if len(shown) > 1 else [0])
        ax.set_yticklabels([str(shown[0].index), str(shown[-1].index)][: len(shown)])
        ax.set_ylabel("request")
        ax.set_xlabel("seconds since the first request of the load")
        legend_below(ax, columns=4)
        of = f"the first {len(shown)} of {n} requests" if len(shown) < n else f"{n} requests"
        heading(
            ax,
            title or f"Token timeline, {level}",
            f"{_whose(bench)}; {of}; a line runs from sent to the end of the stream",
        )
    return ax


def _timeline_row(ax: Axes, row: int, record: Record, zero: float) -> None:
    start = record.sent_s if record.sent_s is not None else record.started_s
    ax.hlines(row, start - zero, record.ended_s - zero, color=MUTED, lw=0.5, zorder=1)
    ax.plot(start - zero, row, ">", ms=2.5, color=MUTED, label="sent" if row == 0 else "_")
    if record.outcome != "ok":
        faults = [e.at_s for e in record.events if e.kind in (ERROR, MALFORMED)]
        at = faults[0] if faults else record.ended_s
        ax.plot(at - zero, row, "x", ms=5, color=_FAULT, mew=1.2, zorder=4)
        text = printable(f" {record.outcome}")
        ax.annotate(text, (at - zero, row), va="center", fontsize=relative_size(0.75), color=_FAULT)


def _scale(metric: str, largest: float) -> tuple[float, str]:
    if metric in ("output_tokens_per_s", "requests_per_s"):
        return 1.0, "1/s"
    return (1e3, "ms") if largest < 2 else (1.0, "s")


def _whose(bench: Bench) -> str:
    if "configurations" in bench.meta:
        machine = next((about["machine"]["name"] for about in bench.meta["configurations"].values() if about), "here")
        return f"{bench.meta['model']['name']} on {machine}, {bench.meta['created'][:10]}"
    if "endpoint" not in bench.meta:
        return f"{bench.meta['model']['name']} on {bench.meta['machine']['name']}, {bench.meta['created'][:10]}"
    endpoint = bench.meta["endpoint"]
    return f"{str(endpoint['model']).rstrip('/').rsplit('/', 1)[-1]} at {endpoint['url']}, {bench.meta['created'][:10]}"


def _lost(*benches: Bench) -> str:
    measured = [record for bench in benches for record in bench.records if record.phase == "measured"]
    failed = sum(record.outcome != "ok" for record in measured)
    return f"{failed} of {len(measured)} requests failed and are not shown"


def _short(levels: Sequence[str]) -> dict[str, str]:
    """Shorten loads to what distinguishes them: "batch 4, 256 + 128 tokens" to "batch 4" if lengths are equal."""
    parts = {level: level.split(", ") for level in levels}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    told = {level: ", ".join(part for part in of if part not in shared) for level, of in parts.items()}
    return {
        level: words.removeprefix("concurrency ").replace("poisson ", "").replace("constant ", "")
        for level, words in told.items()
    }


def _columns(labels: Sequence[str], width: int) -> int:
    """Return how many columns of labels fit into a line of `width` characters."""
    return max(1, width // (max(map(len, labels), default=0) + 6))
