"""Live plots: shares with intervals, and schemes with their frontier."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from mixlens.errors import BadInput
from mixlens.live.matrices import also
from mixlens.live.payload import pack
from mixlens.live.view import View, extremes, static_form, static_table
from mixlens.plot import bars, comparison
from mixlens.plot import labels as wording
from mixlens.plot.checks import takes, takes_run
from mixlens.plot.colours import expert_colours, series_colours
from mixlens.plot.style import note_of
from mixlens.stats.pareto import _SMALLER_IS_BETTER, Pareto


@takes("stats.expert_share", "estimate", "layer", "expert")
def expert_share(data: xr.Dataset) -> View:
    """Show expert shares at a layer as dots with intervals; one domain is selected, the others are faint.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_share`, [layer, expert], also by domain.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or has other dimensions.

    Examples
    --------
    >>> ml.view.expert_share(ml.stats.expert_share(trace, by="domain"))
    View: Expert share
    """
    groups = [str(d) for d in data["estimate"].dims if d not in ("layer", "expert")]
    if len(groups) > 1 or "layer" not in data["estimate"].dims or "expert" not in data["estimate"].dims:
        raise BadInput(
            "Cannot show view.expert_share: it shows layer x expert and one grouping, but the data has "
            f"{', '.join(map(str, data['estimate'].dims)) or 'no dimensions'}. Pass what "
            "ml.stats.expert_share returns.",
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
        "title": wording.title(data),
        "group": group,
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
    static = static_form(bars.expert_share(data), caption, extremes(data, header["uniform"]))
    return View(wording.title(data), "dots", static, pack(header, arrays))


@takes_run("pareto", "of", "front")
def pareto(data: Pareto, *, x: str = "bytes", y: str = "kl") -> View:
    """Show the schemes of one model in two measured quantities, with the frontier of those that none beats in both.

    Parameters
    ----------
    data : Pareto
        From `experiments.measure_pareto`.
    x, y : str, optional
        Quantities to show first; the reader can choose any other.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If `data` is no such run, or a quantity was not measured.

    Examples
    --------
    >>> ml.view.pareto(ml.open("runs/schemes"))  # doctest: +SKIP
    View: KL divergence against weights
    """
    drawn = comparison.pareto(data, x=x, y=y)
    labels, quantities = data.schemes, list(data.table["quantity"].unique())
    arrays = {}
    for i, name in enumerate(quantities):
        rows = data.of(name).reindex(labels)
        factor, _ = comparison.axis_of(name)
        for part, column in (("estimate", "estimate"), ("low", "ci_low"), ("high", "ci_high")):
            arrays[f"{part}{i}"] = rows[column].to_numpy(np.float32) * np.float32(factor)
    title = " against ".join(comparison.axis_of(name)[1].split(",")[0] for name in (y, x))
    header = {
        "title": title,
        "labels": labels,
        "measures": [
            {"name": comparison.axis_of(name)[1], "higher": name not in _SMALLER_IS_BETTER} for name in quantities
        ],
        "start": [quantities.index(x), quantities.index(y)],
        "colours": series_colours(max(8, len(labels))),
        "note": note_of(drawn).replace("whiskers", "bars"),
    }
    columns = {
        measure["name"]: ["–" if np.isnan(v) else f"{v:,.4g}" for v in arrays[f"estimate{i}"]]
        for i, measure in enumerate(header["measures"])
    }
    static = static_form(drawn, f"{title}. {header['note']}", static_table({"scheme": labels, **columns}, "All"))
    return View(title, "pareto", static, pack(header, arrays))
