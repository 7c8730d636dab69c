"""Figures and tables of evaluations: scores against published ones, and paired differences.

Scores are in per cent with 95 % intervals. A published score is drawn only if protocol, metric, average and number of
questions are the same; the table lists all others with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from mixlens.core.text import interval
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.paired import LogComparison
from mixlens.evals.published import beside
from mixlens.evals.scoring import primary_rows
from mixlens.plot.checks import takes_run
from mixlens.plot.colours import SERIES_COLOURS
from mixlens.plot.style import (
    INK,
    MARKERS,
    MUTED,
    PAGE,
    drawing,
    heading,
    in_legend,
    printable,
    relative_size,
)

_STATUS = {"official": "D", "reproduction": "d", "quantized": "v"}


def scores(
    logs: Log | Mapping[str, Log], ax: Axes | None = None, *, subjects: bool = False, title: str | None = None
) -> Axes:
    """Draw scores as a forest plot, one row per benchmark and one point per model, beside published scores.

    Parameters
    ----------
    logs : Log or mapping of str to Log
        One evaluation, or several by display name.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    subjects : bool, optional
        Whether to draw a row for every task of a benchmark instead.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `logs` holds anything but evaluations.

    Examples
    --------
    >>> log = ml.evaluate(model, ["demo"], limit=1)
    >>> ml.show.scores({"demo": log}).get_xlabel()
    'score, %'
    """
    by_name = logs if isinstance(logs, Mapping) else {_label(logs): logs} if isinstance(logs, Log) else {}
    if not by_name or not all(isinstance(log, Log) for log in by_name.values()):
        raise BadInput(
            f"Cannot draw scores: expected evaluations, got {type(logs).__name__}. Pass what ml.evaluate returns.",
            argument="logs",
            value=type(logs).__name__,
        )
    table = pd.concat([_rows(log, name, subjects) for name, log in by_name.items()], ignore_index=True)
    places = {row: i for i, row in enumerate(table["row"].drop_duplicates())}
    with drawing(ax, PAGE * 0.75, 1.0 + 0.3 * len(places) + 0.12 * len(by_name)) as ax:
        for number, (name, of) in enumerate(table.groupby("log", sort=False)):
            offset = 0.22 * (number - (len(by_name) - 1) / 2)
            at = of["row"].map(places) + offset
            mine = of.drop_duplicates("row")
            colour = SERIES_COLOURS[number % len(SERIES_COLOURS)]
            ax.hlines(at[mine.index], mine["ci_low"], mine["ci_high"], color=colour, linewidth=1.4)
            ax.plot(
                mine["score"], at[mine.index], MARKERS[number % len(MARKERS)],
                color=colour, markersize=4.5, label=in_legend(name),
            )  # fmt: skip
            guessed = mine[mine["chance"].notna()]
            if len(guessed):
                ax.plot(guessed["chance"], at[guessed.index], "|", color=MUTED, markersize=8, label="chance")
            for status, published in of[of["comparable"]].groupby("status"):
                ax.plot(
                    published["published"], at[published.index], _STATUS.get(str(status), "D"),
                    color=INK, fillstyle="none", markersize=5, label=f"published: {status}",
                )  # fmt: skip
        _rows_on_axis(ax, places)
        ax.set_xlabel("score, %")
        drawn = pd.concat(
            [table[["score", "ci_low", "ci_high", "chance"]], table["published"].where(table["comparable"])]
        )
        low, high = float(drawn.min().min()), float(drawn.max().max())
        ax.set_xlim(max(0, low - 5), min(101.5, high + 5))
        _legend(ax)
        heading(ax, title or "Benchmark scores", _note(by_name, table))
    return ax


@takes_run("compare, of two evaluations,", "table", "flips")
def paired_differences(compared: LogComparison, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw a forest plot of paired differences, second minus first.

    A point is filled if the difference survives correction for the number of benchmarks, or of tasks within a
    benchmark.

    Parameters
    ----------
    compared : LogComparison
        Result of `compare` for two evaluations of the same samples.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `compared` is not a comparison of evaluations.

    Examples
    --------
    >>> log = ml.evaluate(model, ["demo"], limit=1)
    >>> ml.show.paired_differences(ml.compare(log, log)).get_xlabel()
    'difference, percentage points'
    """
    table = compared.table[compared.table["n"] > 0]
    places = {row: i for i, row in enumerate(_short(table))}
    with drawing(ax, PAGE * 0.75, 1.2 + 0.28 * len(places)) as ax:
        ax.axvline(0, color=MUTED, linewidth=0.8)
        for place, row in enumerate(table.to_dict("records")):
            colour = SERIES_COLOURS[0]
            ax.hlines(place, 100 * row["ci_low"], 100 * row["ci_high"], color=colour, linewidth=1.4)
            ax.plot(
                100 * row["difference"], place, "o", color=colour, markersize=5,
                markerfacecolor=colour if row["survives"] else "white",
            )  # fmt: skip
            if row["only_a"] == row["only_a"]:
                ax.annotate(
                    f"{int(row['only_a'])} lost, {int(row['only_b'])} gained of {int(row['n'])}",
                    (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=relative_size(0.8),
                    color=MUTED,
                )  # fmt: skip
        _rows_on_axis(ax, places)
        ax.set_xlabel("difference, percentage points")
        names = [printable(name) for name in compared.names]
        note = (
            f"{names[1]} less {names[0]} on the same samples, {compared.bootstrap.level:.0%} intervals of paired "
            f"differences over samples; filled where a difference survives at a false discovery rate of "
            f"{1 - compared.bootstrap.level:.2g}."
        )
        told = int(table["survives"].sum())
        message = f"{names[1]} against {names[0]}: {told} of {len(table)} differences survive"
        heading(ax, title or message, note)
    return ax


@takes_run("evaluate", "scores", "samples")
def score_table(log: Log) -> pd.DataFrame:
    """Format the scores of an evaluation as a table for a web page or a paper.

    Parameters
    ----------
    log : Log
        Result of `evaluate`.

    Returns
    -------
    pandas.DataFrame
        All text but n: benchmark, protocol, score with interval, n, published score, difference, and the source of the
        published score or the reason why it is not comparable.

    Raises
    ------
    BadInput
        If `log` is not an evaluation.

    Examples
    --------
    >>> log = ml.evaluate(model, ["demo"], limit=1)
    >>> ml.evals.score_table(log)["benchmark"].tolist()
    ['demo']
    """
    rows = []
    for row in beside(log).to_dict("records"):
        published = row["published"]
        known = published == published
        rows.append(
            {
                "benchmark": row["benchmark"],
                "protocol": row["protocol"],
                "score, %": interval(row["score"], row["ci_low"], row["ci_high"], 1),
                "n": int(row["n"]),
                "published, %": f"{published:.1f}" if known else "–",
                "difference": f"{row['difference']:+.1f}" if row["comparable"] else "not comparable" if known else "–",
                "source or reason": "; ".join(filter(None, [row["source"], row["note"]]))
                if row["comparable"]
                else row["why_not"],
            }
        )
    return pd.DataFrame(rows)


def _rows(log: Log, name: str, subjects: bool) -> pd.DataFrame:
    """Return rows in per cent: log, row, score, ci_low, ci_high, n, chance, published, comparable, status."""
    if not subjects:
        table = beside(log)
        row = [_by_protocol(*pair) for pair in zip(table["benchmark"], table["protocol"], strict=True)]
        of_task = {
            task: _by_protocol(about["benchmark"], about["protocol"]) for task, about in log.meta["tasks"].items()
        }
        table = table.assign(log=name, row=row)
        return table.assign(chance=table["row"].map(_chance(log, of_task)))
    primary = {row["metric"] for row in primary_rows(log.scores, log.meta["tasks"])}
    table = log.scores[(log.scores["average"] == "") & log.scores["metric"].isin(primary)].copy()
    table[["score", "ci_low", "ci_high"]] *= 100
    short = table["task"].str.split("::").str[-1].str.replace("_", " ")
    missing = {"published": float("nan"), "comparable": False, "status": ""}
    chance = table["task"].map(_chance(log, {task: task for task in log.tasks}))
    return table.assign(log=name, row=short, chance=chance, **missing).reset_index(drop=True)


def _by_protocol(benchmark: str, protocol: str) -> str:
    """Name a row, as "mmlu, 5shot"."""
    return f"{benchmark}, {protocol.removeprefix(f'{benchmark}_')}"


def _chance(log: Log, rows: Mapping[str, str]) -> dict[str, float]:
    """Return the score of guessing in per cent, by row, for multiple-choice tasks."""
    choices = [
        (rows[r["task"]], 100 / len(r["choices"])) for r in log.records if r["gold"] is not None and r["choices"]
    ]
    means = pd.DataFrame(choices, columns=["row", "chance"]).groupby("row")["chance"].mean()
    return {str(row): float(value) for row, value in means.items()}


def _note(logs: Mapping[str, Log], table: pd.DataFrame) -> str:
    counts = table.drop_duplicates(["log", "row"])["n"]
    n = f"{counts.min():.0f}" if counts.min() == counts.max() else f"{counts.min():.0f} to {counts.max():.0f}"
    limits = {log.meta["settings"].get("limit") for log in logs.values()} - {None}
    cut = " Only the first samples of every task: no scores of the benchmarks." if limits else ""
    others = int((table["published"].notna() & ~table["comparable"]).sum())
    left = f" {others} published scores by other protocols are not drawn." if others else ""
    dates = " and ".join(sorted({str(log.meta["created"])[:10] for log in logs.values()}))
    return f"95 % intervals over samples; n = {n} a row; {dates}.{cut}{left}"


def _rows_on_axis(ax: Axes, places: Mapping[str, int]) -> None:
    ax.set_yticks(list(places.values()), [printable(row) for row in places])
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e6e6ea", linewidth=0.6)
    ax.set_axisbelow(True)


def _legend(ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if len(once) > 1:
        ax.legend(once.values(), once.keys(), loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _short(table: pd.DataFrame) -> list[str]:
    return [task.split("::")[-1].replace("_", " ") for task in table["task"]]


def _label(log: Log) -> str:
    return log.path.name if log.path is not None else str(log.meta["model"]["name"]).rsplit("/", 1)[-1]
