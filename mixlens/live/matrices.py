"""Live heat maps: layer x expert by domain, co-activation, transitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mixlens.errors import BadInput
from mixlens.live.payload import pack
from mixlens.live.view import View, extremes, static_form
from mixlens.plot import labels, matrices
from mixlens.plot.checks import check, takes
from mixlens.stats.multiplicity import p_against, with_survivors

_PARTS = {"estimate": "estimate", "low": "ci_low", "high": "ci_high"}
_DIGITS_UNTIL = 600  # cells; larger maps show numbers only in the line below them
_FIT_ROUNDS = 200


@dataclass(frozen=True)
class _Axis:
    """A dimension along the rows or columns: its name for linked views, and its label."""

    name: str
    label: str


@takes("stats.expert_share", "estimate")
def share_heatmap(data: xr.Dataset) -> View:
    """Show the share of every expert in every layer: one map per domain, on one scale centred on uniform routing.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_share` or `stats.domain_specialization`, [domain, layer, expert] or [layer, expert].

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or has other dimensions.

    Examples
    --------
    >>> ml.view.share_heatmap(ml.stats.expert_share(trace, by="domain"))
    View: Expert share
    """
    group = _group(data, "share_heatmap", ("layer", "expert"))
    drawn = matrices.share_heatmap(data) if group is None else matrices.facet(matrices.share_heatmap, data, group)
    return _view(data, drawn, panels=group, rows=_Axis("layer", "layer"), columns=_Axis("expert", "expert"))


@takes("stats.coactivation", "estimate")
def coactivation(data: xr.Dataset) -> View:
    """Show how often experts are chosen together, relative to chance.

    The ratio is N_ij / (a_i a_j): expected counts are a product of one factor per expert, fitted so that every expert
    keeps its own number of pairs and none pairs with itself (quasi-independence). 1 is chance. The interval is that of
    P(j | i) over the same expectation.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.coactivation`, [layer, expert, expert_j], also by domain.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or has other dimensions.

    Examples
    --------
    >>> ml.view.coactivation(ml.stats.coactivation(trace))
    View: Co-activation
    """
    group = _group(data, "coactivation", ("layer", "expert", "expert_j"))
    middle = int(data["layer"][data.sizes["layer"] // 2])
    shown = data if group is None else data.isel({group: 0})
    return _view(
        _observed_over_expected(data),
        matrices.coactivation(shown, layer=middle),
        picks=["layer", *([group] if group else [])],
        rows=_Axis("expert", "i"),
        columns=_Axis("expert_j", "j"),
    )


def transitions(data: xr.Dataset | Sequence[xr.Dataset]) -> View:
    """Show where first choices go from one layer to a later one, with sliders for the layer and for the gap.

    Parameters
    ----------
    data : xarray.Dataset or sequence of xarray.Dataset
        From `stats.transitions`, [layer, expert, expert_j], also by domain; or several of them with different gaps.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If `data` is empty, holds anything else, or has other dimensions.

    Examples
    --------
    >>> ml.view.transitions([ml.stats.transitions(trace, gap=gap) for gap in (1, 2)])
    View: Transitions between layers
    """
    given = [data] if isinstance(data, xr.Dataset) or not isinstance(data, Sequence) else list(data)
    for one in given:
        check(one, "transitions", "stats.transitions", "estimate", "gap")
    given.sort(key=lambda d: int(d.attrs["gap"]))
    if not given:
        raise BadInput(
            "Cannot show transitions: the list is empty. Pass ml.stats.transitions(trace, gap=1), or a list over "
            "several gaps.",
            argument="data",
            value=0,
        )
    first = given[0]
    group = _group(first, "transitions", ("layer", "expert", "expert_j"))
    names = [name for name in (*_PARTS.values(), "n", "survives") if all(name in d for d in given)]
    parts = [d[names].expand_dims(gap=[int(d.attrs["gap"])]) for d in given]
    joined = xr.concat(parts, "gap", join="outer").assign_attrs(first.attrs)
    shown = first if group is None else first.isel({group: 0})
    middle = int(shown["layer"][shown.sizes["layer"] // 2])
    return _view(
        joined,
        matrices.transitions(shown, layer=middle),
        picks=["gap", "layer", *([group] if group else [])],
        rows=_Axis("expert", "from"),
        columns=_Axis("expert_j", "to"),
    )


def _group(data: xr.Dataset, what: str, own: tuple[str, ...]) -> str | None:
    """Return the one dimension other than `own`, or None; raise BadInput if dimensions are missing or left over."""
    others = [str(d) for d in data["estimate"].dims if d not in own]
    missing = [d for d in own if d not in data["estimate"].dims]
    if missing or len(others) > 1:
        raise BadInput(
            f"Cannot show view.{what}: it shows {' x '.join(own)} and one grouping, but the data has "
            f"{', '.join(map(str, data['estimate'].dims)) or 'no dimensions'}. Pass a statistic "
            "computed with at most one column in by=.",
            argument="data",
            value=list(data["estimate"].dims),
        )
    return others[0] if others else None


def _view(
    data: xr.Dataset, drawn: Any, *, rows: _Axis, columns: _Axis, picks: Sequence[str] = (), panels: str | None = None
) -> View:
    dims = [*picks, *([panels] if panels else []), rows.name, columns.name]
    arrays: dict[str, Any] = {n: data[v].transpose(*dims).to_numpy().astype(np.float32) for n, v in _PARTS.items()}
    counts = xr.zeros_like(data["estimate"]) + data["n"].fillna(0)
    arrays["n"] = counts.transpose(*dims).fillna(0).to_numpy().astype(np.int32)
    survives = data.get("survives", xr.zeros_like(data["estimate"])) == 1  # NaN where a gap has no such layer
    arrays["survives"] = survives.transpose(*dims).to_numpy().astype(np.uint8)
    digits = arrays["estimate"].size // max(1, _pages(data, picks)) <= _DIGITS_UNTIL
    ratio = data.attrs["unit"] == "ratio"
    centre = 1.0 if ratio else _centre(data)
    header = {
        "title": labels.title(data),
        "group": panels,
        "note": _note(data, digits),
        "unit": data.attrs["unit"],
        "of": "expected" if ratio else labels.denominator(data),
        "also": also(data),
        "centre": centre,
        "limit": _limit(data, centre, ratio),
        "digits": digits,
        "picks": [_pick(data, name) for name in picks],
        "panels": [None] if panels is None else [str(v) for v in data[panels].to_numpy()],
        "row": {"name": rows.name, "label": rows.label, "values": data[rows.name].to_numpy().tolist()},
        "column": {"name": columns.name, "label": columns.label, "values": data[columns.name].to_numpy().tolist()},
    }
    caption = f"{header['title']} of {data.attrs.get('model', 'a model')}. {header['note']}"
    return View(header["title"], "matrix", static_form(drawn, caption, extremes(data, centre)), pack(header, arrays))


def _pages(data: xr.Dataset, picks: Sequence[str]) -> int:
    return int(np.prod([data.sizes[name] for name in picks]))


def _pick(data: xr.Dataset, name: str) -> dict[str, Any]:
    values = data[name].to_numpy().tolist()
    slider = name in ("layer", "gap")
    return {"name": name, "values": values, "slider": slider, "start": len(values) // 2 if name == "layer" else 0}


def _centre(data: xr.Dataset) -> float:
    value = labels.uniform(data)
    return float(data["estimate"].mean()) if value is None else float(np.ravel(value)[0])


def _limit(data: xr.Dataset, centre: float, ratio: bool) -> float:
    """Return the distance from the centre at the ends of the scale, in powers of two for a ratio.

    The distance has a lower bound, so that noise does not look vivid. A ratio's scale ends at eight times or an eighth,
    because pairs that hardly ever occur would take up all of it.
    """
    values = data["estimate"].to_numpy()
    values = values[np.isfinite(values) & ((values > 0) | (not ratio))]
    far = np.abs(np.log2(values)) if ratio else np.abs(values - centre)
    least, most = (1.0, 3.0) if ratio else (max(abs(centre) / 5, 1e-9), np.inf)
    return float(np.clip(np.quantile(far, 0.995) if far.size else 0.0, least, most))


def _note(data: xr.Dataset, digits: bool) -> str:
    middle = "chance" if data.attrs["unit"] == "ratio" else labels.uniform_text(data)
    about = [
        labels.sample(data),
        labels.over(data),
        f"middle of the scale: {middle}",
    ]
    return "; ".join(filter(None, [*about, labels.marked(data, "bold") if digits else ""])) + "."


def also(data: xr.Dataset) -> list[Any] | None:
    """Return [factor, unit] of a share's other denominator: a share of tokens is top-k times that of assignments."""
    k = data.attrs.get("top_k")
    whole = labels.statistic(data) == "expert_share" and data.attrs.get("slot") == "any"
    return [int(k), "of tokens"] if k and whole else None


def _observed_over_expected(data: xr.Dataset) -> xr.Dataset:
    """Divide P(j | i) by its value if pairs formed by chance among experts with these counts."""
    dims = ("expert", "expert_j")
    observed = (data["estimate"].fillna(0) * data["n"].fillna(0)).transpose(..., *dims)
    counts = observed.to_numpy()
    margins = counts.sum(-1)
    factor = np.sqrt(margins)
    for _ in range(_FIT_ROUNDS):  # a_i <- N_i / sum of the other factors, damped
        others = factor.sum(-1, keepdims=True) - factor
        with np.errstate(invalid="ignore", divide="ignore"):
            factor = np.sqrt(factor * np.nan_to_num(margins / others))
    expected = factor[..., :, None] * factor[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = observed.copy(data=np.where(expected > 0, expected, np.nan)) / data["n"]
    data = data.assign({name: data[name] / chance for name in _PARTS.values()})
    if "n_effective" not in data:
        return data.drop_vars("survives", errors="ignore").assign_attrs(unit="ratio", statistic="coactivation")
    numbers = (data[name] for name in _PARTS.values())
    p = xr.apply_ufunc(p_against, *numbers, 1.0, data["n_effective"], data.attrs["level"])
    return with_survivors(data, p, data.attrs["level"]).assign_attrs(unit="ratio", statistic="coactivation")
