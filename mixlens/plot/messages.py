"""One-line messages for figure titles: the largest difference from chance, or the name of the statistic.

Messages mention only numbers that survive correction for all numbers of their statistic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from mixlens.plot import labels


def message(data: xr.Dataset) -> str:
    """Return the title of a figure of `data`."""
    say = _SAY.get(labels.statistic(data))
    if say is None or "survives" not in data or not data.attrs.get("cells"):
        return named(data)
    return say(data)


def named(data: xr.Dataset) -> str:
    """Return the name of the statistic and the selection, as "Expert share, layer 3"."""
    selected = labels.chosen(data)
    return f"{labels.title(data)}, {selected}" if selected else labels.title(data)


def furthest(data: xr.Dataset) -> xr.Dataset | None:
    """Return the number furthest from a null model or uniform, or the largest if there is neither; None without any."""
    expected = data["expected"] if "expected" in data else labels.uniform(data)
    return at_largest(data, data["estimate"] if expected is None else abs(data["estimate"] - expected))


def furthest_surviving(data: xr.Dataset) -> xr.Dataset | None:
    """Return the surviving number furthest from uniform; None if none survives."""
    return furthest(data.assign(estimate=data["estimate"].where(data["survives"])))


def at_largest(data: xr.Dataset, score: xr.DataArray) -> xr.Dataset | None:
    """Return the number with the largest `score`; None if all are missing."""
    score = score.transpose(*data["estimate"].dims)
    if not np.isfinite(score).any():
        return None
    place = np.unravel_index(int(np.nanargmax(score.to_numpy())), score.shape)
    return data.isel({d: int(i) for d, i in zip(score.dims, place, strict=True)})


def _cell(say: Callable[[xr.Dataset, dict[str, Any]], str]) -> Callable[[xr.Dataset], str]:
    """Return a message about the cell furthest from uniform, made by `say` from the cell and its coordinates."""

    def said(data: xr.Dataset) -> str:
        cell = furthest_surviving(data)
        if cell is None:
            return f"{named(data)}: no significant difference from {data.attrs.get('null', 'uniform')}"
        return say(cell, {str(name): coord.item() for name, coord in cell.coords.items() if coord.ndim == 0})

    return said


def _group(at: dict[str, Any]) -> str:
    """Return the label of the coordinate that is neither layer nor expert; empty if there is none."""
    known = ("layer", "expert", "expert_j", "slot", *labels.OURS)
    return next((f"{name.replace('_bin', '')} {value}" for name, value in at.items() if name not in known), "")


def _layer(at: dict[str, Any]) -> str:
    return f"layer {at['layer']}" if "layer" in at else ""


def _share(cell: xr.Dataset, at: dict[str, Any]) -> str:
    where = ", ".join(filter(None, [_layer(at), _group(at)]))
    return f"Expert {at['expert']} takes {labels.number(float(cell['estimate']), cell)}{where and f' in {where}'}"


def _specialization(cell: xr.Dataset, at: dict[str, Any]) -> str:
    number, group = labels.number(float(cell["estimate"]), cell), _group(at).split(" ", 1)[-1]
    where = _layer(at)
    return f"{number} of {group} tokens choose expert {at['expert']}{where and f' in {where}'}"


def _together(cell: xr.Dataset, at: dict[str, Any]) -> str:
    number = labels.number(float(cell["estimate"]), cell)
    where = _layer(at)
    return f"Tokens of expert {at['expert']} also choose expert {at['expert_j']} in {number}{where and f', {where}'}"


def _moves(cell: xr.Dataset, at: dict[str, Any]) -> str:
    number = labels.number(float(cell["estimate"]), cell)
    where = f", layers {at['layer']} to {at['layer'] + int(cell.attrs.get('gap', 1))}" if "layer" in at else ""
    return f"From expert {at['expert']}, {number} go to expert {at['expert_j']}{where}"


def _repetition(data: xr.Dataset) -> str:
    told, of = int(data["survives"].sum()), int(np.isfinite(data["p"]).sum())
    what = "layers" if set(data["estimate"].dims) <= {"layer"} else "cells"
    choice = str(data["choice"].item())
    against = data.attrs.get("null", "chance")
    differs = (
        f"differs from {against} in {told} of {of} {what}" if told else f"no significant difference from {against}"
    )
    return f"{labels.MEASURES[choice].capitalize()}: {differs}"


def _information(data: xr.Dataset) -> str:
    excess = data.sel(measure="excess") if "measure" in data.dims else data
    told = int((excess["survives"] & (excess["estimate"] > 0)).sum())
    return f"Routing depends on the {data.attrs.get('group', 'domain')} in {told} of {excess.sizes['layer']} layers"


def _contrast(data: xr.Dataset) -> str:
    a, b, told = data.attrs["a"], data.attrs["b"], int(data["survives"].sum())
    if not told:
        return f"No significant difference between {a} and {b}".replace("_", " ")
    return f"{a} differs from {b} in {told} of {data['estimate'].size:,} cells".replace("_", " ")


def _importance(data: xr.Dataset) -> str:
    cell, told = furthest_surviving(data.assign(estimate=abs(data["estimate"]))), int(data["survives"].sum())
    of = int(np.isfinite(data["estimate"]).sum())
    if cell is None:
        return f"{named(data)}: no significant effect"
    place = f"expert {cell['expert'].item()} in layer {cell['layer'].item()}"
    return f"{told} of {of} experts matter, most of all {place}"


_SAY: dict[str, Callable[[xr.Dataset], str]] = {
    "expert_share": _cell(_share),
    "position_profile": _cell(_share),
    "domain_specialization": _cell(_specialization),
    "coactivation": _cell(_together),
    "transitions": _cell(_moves),
    "repetition": _repetition,
    "domain_information": _information,
    "contrast": _contrast,
    "expert_importance": _importance,
    "expert_contribution": _importance,
}
