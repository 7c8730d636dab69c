"""The sections of a report on an importance run: functions from its sums over documents to HTML."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens import show
from mixlens.show import wording
from mixlens.show.html import bullets, details, paragraphs, picture
from mixlens.show.tables import html_table
from mixlens.stats.importance import expert_importance

_MOST_NAMED = 8
_HOW = {
    "reroute": "never chosen, the next best in its place and the weights renormalised",
    "zero": "chosen as ever, its output zero",
    "mean": "chosen as ever, its output replaced by its mean",
}


def importance_sections(measured: xr.Dataset, name: str) -> dict[str, str]:
    """Importance over all documents, and by domain where the documents have one."""
    whole = expert_importance(measured)
    sections = {"Importance of experts": _whole(whole)}
    domain = measured.coords.get("domain")
    if domain is not None and all(value is not None for value in domain.values) and len(set(domain.values)) > 1:
        sections["Importance by domain"] = _by_domain(expert_importance(measured, by="domain"))
    return sections


def _whole(data: xr.Dataset) -> str:
    intro = (
        f"Each expert of each layer in turn was {_HOW.get(str(data.attrs['how']), data.attrs['how'])}; the number is "
        f"the change this makes, on the same tokens. {_value(data)}. {wording.sample(data)}."
    )
    return (
        paragraphs(intro)
        + bullets(_largest(data))
        + _figure(show.importance(data), "Change without each expert, by layer.")
        + _figure(show.importance_against_share(data), "Change without an expert against how often it is chosen.")
        + details("Table", html_table(data, "Importance of experts"))
    )


def _by_domain(data: xr.Dataset) -> str:
    return (
        bullets(_largest(data))
        + _figure(show.importance_by_domain(data), "Change without each expert, a row a domain.")
        + details("Table", html_table(data, "Importance by domain"))
    )


def _largest(data: xr.Dataset) -> list[str]:
    """The largest changes whose interval excludes 0, in words."""
    flat = data.stack(cell=data["estimate"].dims)
    apart = (flat["ci_low"] > 0) | (flat["ci_high"] < 0)
    order = np.argsort(-np.abs(flat["estimate"].where(apart).fillna(0).to_numpy()), kind="stable")
    named = [flat.isel(cell=int(i)) for i in order[:_MOST_NAMED] if bool(apart[int(i)])]
    if not named:
        return [f"No change is told apart from 0 at the {wording.level(data)}."]
    return [
        f"{f'{cell.domain.item()}: ' if 'domain' in cell.coords else ''}layer {cell.layer.item()}, expert "
        f"{cell.expert.item()}: {wording.with_interval(cell)} {data.attrs['unit']} a token, chosen for "
        f"{100 * float(cell['share']):.1f} % of assignments"
        for cell in named
    ]


def _value(data: xr.Dataset) -> str:
    name = str(data.attrs["metric"]).rsplit(".", 1)[-1]
    return f"With all experts the {name} is {float(data['value']):.3f} {data.attrs['unit']} a token"


def _figure(ax, text: str) -> str:
    return picture(ax, text, text)
