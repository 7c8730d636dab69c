"""Interactive latency curves of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mixlens.bench.bench import Bench
from mixlens.errors import BadInput
from mixlens.live.payload import pack
from mixlens.live.view import View, static_form, static_table
from mixlens.plot.colours import series_colours
from mixlens.plot.style import PAGE, drawing, heading, in_legend

_METRICS = {
    "ttft_s": "time to first token",
    "tpot_s": "time per token",
    "e2e_token_s": "end to end",
}


def latency(bench: Bench | Mapping[str, Bench]) -> View:
    """Show the cumulative distribution of latency, with one curve per load, or per load of each named benchmark.

    Failed requests are excluded, since the time to a failure is not a latency; the view states their number.

    Parameters
    ----------
    bench : Bench or mapping of str to Bench
        One benchmark, or several by display name.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If no request was measured.

    Examples
    --------
    >>> ml.view.latency(ml.open("runs/vllm"))  # doctest: +SKIP
    View: Latency
    """
    named = {"": bench} if isinstance(bench, Bench) else dict(bench)
    tables = [(name, one.requests().query("phase == 'measured'")) for name, one in named.items()]
    groups = {
        f"{name} {level}".strip(): rows for name, table in tables for level, rows in table.groupby("level", sort=False)
    }
    if not groups:
        raise BadInput(
            "Cannot show latency curves: no request was measured. Run ml.benchmark with at least one request after "
            "the warm-up.",
            argument="bench",
            value=0,
        )
    arrays: dict[str, np.ndarray] = {}
    metrics = []
    for metric, title in _METRICS.items():
        curves = []
        for label, rows in groups.items():
            key = f"v{len(arrays)}"
            arrays[key] = np.sort(rows[metric].dropna().to_numpy(np.float32))
            curves.append({"label": label, "array": key})
        metrics.append({"name": title, "curves": curves})
    failed = sum(int((rows["outcome"] != "ok").sum()) for rows in groups.values())
    total = sum(len(rows) for rows in groups.values())
    note = f"n = {total:,} measured requests, {failed:,} failed and not shown; warm-up excluded."
    header = {"title": "Latency", "metrics": metrics, "note": note, "colours": series_colours(max(8, len(groups)))}
    caption = f"Latency of {' and '.join(dict.fromkeys(b.meta['model']['name'] for b in named.values()))}. {note}"
    table = static_table(_quantiles(groups), "Time to first token by load")
    return View("Latency", "ecdf", static_form(_latency_picture(groups, note), caption, table), pack(header, arrays))


def _quantiles(groups: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    def at(rows: pd.DataFrame, q: float) -> str:
        values = rows["ttft_s"].dropna()
        return f"{values.quantile(q):.3g} s" if len(values) else "–"

    columns: dict[str, list[str]] = {"load": list(groups)}
    columns["succeeded"] = [f"{(rows['outcome'] == 'ok').sum()} of {len(rows)}" for rows in groups.values()]
    return columns | {f"p{100 * q:.0f}": [at(rows, q) for rows in groups.values()] for q in (0.5, 0.9, 0.95)}


def _latency_picture(groups: Mapping[str, pd.DataFrame], note: str) -> Axes:
    with drawing(None, PAGE * 0.7, 2.6) as ax:
        for (label, rows), colour in zip(groups.items(), series_colours(len(groups)), strict=True):
            values = np.sort(rows["ttft_s"].dropna().to_numpy())
            if len(values):
                ax.step(
                    values,
                    (np.arange(len(values)) + 1) / len(values),
                    where="post",
                    color=colour,
                    label=in_legend(label),
                )
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("time to first token [s]")
        ax.set_ylabel("share of requests")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        heading(ax, "Time to first token", note)
    return ax
