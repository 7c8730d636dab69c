"""Live plots: shares with intervals, latency curves, and points with a frontier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from mixlens.bench.bench import Bench
from mixlens.errors import BadInput
from mixlens.show import comparison, figures, wording
from mixlens.show.packing import pack
from mixlens.show.style import PAGE, drawing, expert_colours, heading, in_legend, note_of
from mixlens.show.taking import takes, takes_run
from mixlens.show.view.base import View, extremes, static_form, static_table
from mixlens.show.view.matrices import also
from mixlens.stats.pareto import _SMALLER_IS_BETTER, Pareto

_METRICS = {
    "ttft_s": "time to first token",
    "tpot_s": "time per token",
    "e2e_token_s": "end to end",
}


@takes("stats.expert_share", "estimate", "layer", "expert")
def expert_share(data: xr.Dataset) -> View:
    """Share of every expert at a layer as dots with intervals; one domain is chosen, the others stay as faint dots.

    data   from stats.expert_share  [layer, expert], also by domain

    Raises BadInput where the data has other dimensions.
    """
    groups = [str(d) for d in data["estimate"].dims if d not in ("layer", "expert")]
    if len(groups) > 1 or "layer" not in data["estimate"].dims or "expert" not in data["estimate"].dims:
        raise BadInput(
            "view.expert_share was asked for. It shows layer x expert, and one grouping; the data has "
            f"{', '.join(map(str, data['estimate'].dims)) or 'no dimensions'}. Give what stats.expert_share returns.",
            argument="data",
            value=list(data["estimate"].dims),
        )
    whole = data if groups else data.expand_dims("all")
    group = groups[0] if groups else "all"
    dims = (group, "layer", "expert")
    names = {"estimate": "estimate", "low": "ci_low", "high": "ci_high"}
    arrays: dict[str, Any] = {
        name: whole[v].transpose(*dims).to_numpy().astype(np.float32) for name, v in names.items()
    }
    counts = (xr.zeros_like(whole["estimate"]) + whole["n"].fillna(0)).transpose(*dims)
    arrays["n"] = counts.fillna(0).to_numpy().astype(np.int32)
    uniform = wording.uniform(data)
    header = {
        "colours": expert_colours(data.sizes["expert"]),
        "layers": data["layer"].to_numpy().tolist(),
        "domains": [str(v) for v in whole[group].to_numpy()] if groups else ["all"],
        "experts": data["expert"].to_numpy().tolist(),
        "start": data.sizes["layer"] // 2,
        "uniform": float(np.ravel(uniform)[0]) if uniform is not None else 0.0,
        "unit": data.attrs["unit"],
        "of": wording.denominator(data),
        "also": also(data),
        "note": wording.note(data, drawn="bars") + ".",
    }
    caption = f"{wording.title(data)} of {data.attrs.get('model', 'a model')}. {header['note']}"
    static = static_form(figures.expert_share(data), caption, extremes(data, header["uniform"]))
    return View(wording.title(data), "dots", static, pack(header, arrays))


def latency(bench: Bench | Mapping[str, Bench]) -> View:
    """Share of requests that took at most so long: one curve a load, or a load of each named benchmark.

    Failed requests are in no curve, since what it took to fail is no latency; their number is said.

    Raises BadInput where no request was measured.
    """
    named = {"": bench} if isinstance(bench, Bench) else dict(bench)
    tables = [(name, one.requests().query("phase == 'measured'")) for name, one in named.items()]
    groups = {
        f"{name} {level}".strip(): rows for name, table in tables for level, rows in table.groupby("level", sort=False)
    }
    if not groups:
        raise BadInput(
            "Latency curves were to be shown. No request was measured. Run ml.benchmark with at least one request "
            "after the warm-up.",
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
    note = f"n = {total:,} measured requests, {failed:,} failed and in no curve; warm-up left out."
    header = {"metrics": metrics, "note": note, "colours": expert_colours(max(8, len(groups)))}
    caption = f"Latency of {' and '.join(dict.fromkeys(b.meta['model']['name'] for b in named.values()))}. {note}"
    table = static_table(_quantiles(groups), "Time to first token by load")
    return View("Latency", "ecdf", static_form(_latency_picture(groups, note), caption, table), pack(header, arrays))


@takes_run("pareto", "of", "front")
def pareto(data: Pareto, *, x: str = "bytes", y: str = "kl") -> View:
    """Schemes of one model in two of the measured quantities, with the frontier of those that none beats in both.

    data   from mixlens.pareto
    x, y   the quantities shown first; every other one can be chosen

    Raises BadInput for a quantity that was not measured.
    """
    drawn = comparison.pareto(data, x=x, y=y)
    labels, quantities = data.schemes, list(data.table["quantity"].unique())
    arrays = {}
    for i, name in enumerate(quantities):
        rows = data.of(name).reindex(labels)
        factor, _ = comparison.axis_of(name)
        for part, column in (("estimate", "estimate"), ("low", "ci_low"), ("high", "ci_high")):
            arrays[f"{part}{i}"] = rows[column].to_numpy(np.float32) * np.float32(factor)
    header = {
        "labels": labels,
        "measures": [
            {"name": comparison.axis_of(name)[1], "higher": name not in _SMALLER_IS_BETTER} for name in quantities
        ],
        "start": [quantities.index(x), quantities.index(y)],
        "colours": expert_colours(max(8, len(labels))),
        "note": note_of(drawn).replace("whiskers", "bars"),
    }
    columns = {
        measure["name"]: ["–" if np.isnan(v) else f"{v:,.4g}" for v in arrays[f"estimate{i}"]]
        for i, measure in enumerate(header["measures"])
    }
    title = " against ".join(comparison.axis_of(name)[1].split(",")[0] for name in (y, x))
    static = static_form(drawn, f"{title}. {header['note']}", static_table({"scheme": labels, **columns}, "All"))
    return View(title, "pareto", static, pack(header, arrays))


def _quantiles(groups: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    def at(rows: pd.DataFrame, q: float) -> str:
        values = rows["ttft_s"].dropna()
        return f"{values.quantile(q):.3g} s" if len(values) else "–"

    columns: dict[str, list[str]] = {"load": list(groups)}
    columns["succeeded"] = [f"{(rows['outcome'] == 'ok').sum()} of {len(rows)}" for rows in groups.values()]
    return columns | {f"p{100 * q:.0f}": [at(rows, q) for rows in groups.values()] for q in (0.5, 0.9, 0.95)}


def _latency_picture(groups: Mapping[str, pd.DataFrame], note: str) -> Axes:
    with drawing(None, PAGE * 0.7, 2.6) as ax:
        for (label, rows), colour in zip(groups.items(), expert_colours(len(groups)), strict=True):
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
