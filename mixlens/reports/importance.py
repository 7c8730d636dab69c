"""Report sections on the importance of experts."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens import show
from mixlens.plot import labels
from mixlens.plot.html import bullets, details, paragraphs, picture
from mixlens.plot.tables import html_table
from mixlens.stats.importance import expert_importance

_MOST_NAMED = 8
_SCALE = "Where a few numbers are far larger than the rest, colours are linear near 0 and logarithmic beyond, as noted."
_HOW = {
    "reroute": "never chosen, the next best in its place and the weights renormalised",
    "zero": "chosen as ever, its output zero",
    "mean": "chosen as ever, its output replaced by its mean",
}


def importance_sections(measured: xr.Dataset, name: str) -> dict[str, str]:
    """Return importance over all documents as HTML, by title; also by domain if the documents have one."""
    whole = expert_importance(measured)
    sections = {"Importance of experts": _whole(whole)}
    if has_domains(measured):
        sections["Importance by domain"] = _by_domain(expert_importance(measured, by="domain"))
    return sections


def importance_findings(measured: xr.Dataset) -> list[tuple[str, str]]:
    """Return the largest changes that survive, with the heading of their section."""
    whole = expert_importance(measured)
    said = cells_apart(whole, f"{whole.attrs['unit']} per token")
    return [("Importance of experts", f"Without {sentence}") for sentence in said[1:]] or [
        ("Importance of experts", said[0])
    ]


def has_domains(measured: xr.Dataset) -> bool:
    """Return True if every document has a domain, and there are several."""
    domain = measured.coords.get("domain")
    return domain is not None and all(value is not None for value in domain.values) and len(set(domain.values)) > 1


def _whole(data: xr.Dataset) -> str:
    intro = (
        f"Each expert of each layer in turn was {_HOW.get(str(data.attrs['how']), data.attrs['how'])}; the number is "
        f"the change this makes, on the same tokens. {_value(data)}. {labels.sample(data)}."
    )
    return (
        paragraphs(intro)
        + bullets(cells_apart(data, f"{data.attrs['unit']} per token"))
        + _figure(show.expert_importance(data), f"Change without each expert, by layer. {_SCALE}")
        + _figure(show.importance_against_share(data), "Change without an expert against how often it is chosen.")
        + details("Table", html_table(data, "Importance of experts"))
    )


def _by_domain(data: xr.Dataset) -> str:
    return (
        bullets(cells_apart(data, f"{data.attrs['unit']} per token"))
        + _figure(show.importance_by_domain(data), f"Change without each expert, a row a domain. {_SCALE}")
        + details("Table", html_table(data, "Importance by domain"))
    )


def cells_apart(data: xr.Dataset, unit: str) -> list[str]:
    """Describe the numbers furthest from 0 among those that survive adjustment for multiple testing."""
    flat = data.stack(cell=data["estimate"].dims)
    survives = flat["survives"]
    order = np.argsort(-np.abs(flat["estimate"].where(survives).fillna(0).to_numpy()), kind="stable")
    named = [flat.isel(cell=int(i)) for i in order[:_MOST_NAMED] if bool(survives[int(i)])]
    if not named:
        return [labels.none_survives(data, "number", "0")]
    return [
        f"{int(survives.sum()):,} numbers differ significantly from 0: each {labels.survivors(data)}. The largest:",
        *(_named(cell, unit) for cell in named),
    ]


def _named(cell: xr.Dataset, unit: str) -> str:
    return (
        f"{f'{cell.domain.item()}: ' if 'domain' in cell.coords else ''}layer {cell.layer.item()}, expert "
        f"{cell.expert.item()}: {labels.with_interval(cell)} {unit}{_use(cell)}"
    )


def _use(cell: xr.Dataset) -> str:
    return f", chosen for {100 * float(cell['share']):.1f} % of assignments" if "share" in cell else ""


def _value(data: xr.Dataset) -> str:
    name = str(data.attrs["metric"]).rsplit(".", 1)[-1]
    return f"With all experts the {name} is {float(data['value']):.3f} {data.attrs['unit']} per token"


def _figure(ax, text: str) -> str:
    return picture(ax, text, text)
