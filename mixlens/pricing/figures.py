"""Figure of quality against cost and speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from matplotlib.axes import Axes

from mixlens.bench.bench import Bench
from mixlens.core.text import interval
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.plot.colours import SERIES_COLOURS
from mixlens.plot.style import (
    MUTED,
    PAGE,
    drawing,
    heading,
    legend_below,
    printable,
    relative_size,
)
from mixlens.pricing.tradeoff import Candidate, candidates, frontier


def quality_cost_speed(
    runs: Sequence[Log | Bench | Candidate] | pd.DataFrame,
    ax: Axes | None = None,
    *,
    score: str | None = None,
    title: str | None = None,
) -> Axes:
    """Draw quality against cost, with speed as the area of a point.

    Candidates on the Pareto frontier are filled, all others hollow.

    Parameters
    ----------
    runs : sequence of Log, Bench or Candidate, or pandas.DataFrame
        Evaluations and benchmarks of the same models, such as ``[log, bench]``, which `pricing.candidates` combines;
        Candidates; or the result of `pricing.frontier`.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    score : str, optional
        For evaluations, the benchmark or protocol to use if they share several. For Candidates without a benchmark, the
        name of their score.
    title : str, optional
        Title. By default the main finding, if one was computed, or a description of the figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `pricing.candidates` or `pricing.frontier` rejects `runs`, or no candidate has a score, a price and a speed.

    Examples
    --------
    >>> slow = ml.pricing.Candidate("slow", (70.0, 68.0, 72.0), 0.5, (40.0, 35.0, 45.0))
    >>> fast = ml.pricing.Candidate("fast", (69.0, 67.0, 71.0), 0.6, (90.0, 80.0, 99.0))
    >>> ml.show.quality_cost_speed([slow, fast], score="MMLU").get_ylabel()
    'MMLU'
    """
    if isinstance(runs, pd.DataFrame):
        frame = runs
    else:
        runs = list(runs) if isinstance(runs, Iterable) else [runs]
        measured = [run for run in runs if not isinstance(run, Candidate)]
        given = [run for run in runs if isinstance(run, Candidate)]
        frame = frontier([*(candidates(measured, score=score) if measured else []), *given])
    score = str(frame["benchmark"].iloc[0]) or score
    known = frame.dropna(subset=["score", "usd_per_mtok", "tokens_per_s"])
    if known.empty:
        raise BadInput(
            f"Cannot draw {len(frame)} candidates: none has a score, a price and a speed. "
            "Pass at least one candidate with all three.",
            argument="runs",
            value=len(frame),
        )
    area = 170 * known["tokens_per_s"] / known["tokens_per_s"].max()
    with drawing(ax, PAGE * 0.8, 2.9 + 0.14 * len(known)) as ax:
        colour = SERIES_COLOURS[0]
        faces = [colour if on else "white" for on in known["frontier"]]
        ax.vlines(known["usd_per_mtok"], known["score_low"], known["score_high"], color=MUTED, lw=0.8, zorder=1)
        ax.scatter(known["usd_per_mtok"], known["score"], s=area, c=faces, edgecolors=colour, lw=1, zorder=2)
        numbers: dict[tuple[float, float], list[str]] = {}
        for number, (row, face) in enumerate(zip(known.to_dict("records"), faces, strict=True), 1):
            place = float(row["usd_per_mtok"]), float(row["score"])
            numbers.setdefault(place, []).append(str(number))  # several loads can share a price and a score
            speed, low, high = (float(row[f"tokens_per_s{end}"]) for end in ("", "_low", "_high"))
            label = printable(f"{number}  {row['name']}: {interval(speed, low, high, 1)} tok/s")
            ax.plot([], [], "o", ms=5, markerfacecolor=face, markeredgecolor=colour, label=label)
        for place, told in numbers.items():
            beside = {"xytext": (9, 5), "textcoords": "offset points"}
            ax.annotate(", ".join(told), place, fontsize=relative_size(0.9), **beside)
        if known["usd_per_mtok"].min() > 0 and known["usd_per_mtok"].max() > 4 * known["usd_per_mtok"].min():
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
        ax.margins(x=0.4, y=0.2)
        ax.set_xlabel("dollars per million tokens")
        ax.set_ylabel(printable(score or "score"))
        legend_below(ax, columns=1)
        left_out = f"; {len(frame) - len(known)} without all three numbers left out" if len(frame) > len(known) else ""
        note = (
            f"{len(known)} candidates; area: output tokens per second; filled: no other is as good in all three and "
            "better in one; whiskers: interval of the score"
        )
        heading(ax, title or "Quality, cost and speed", note + left_out)
    return ax
