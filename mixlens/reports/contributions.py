"""Report sections on contributions and on a sweep over k."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens import show
from mixlens.plot import labels
from mixlens.plot.html import bullets, details, paragraphs, picture
from mixlens.plot.tables import html_table
from mixlens.reports.importance import cells_apart, has_domains
from mixlens.stats.contributions import expert_contribution
from mixlens.stats.outputs import super_experts
from mixlens.stats.topk import topk_sweep

_TOKENS = 64  # of the text that is drawn
_FAR = 10  # times the median, above which an expert stands out


def contribution_sections(contributions: xr.Dataset, name: str) -> dict[str, str]:
    """Return what experts add to the next token's logit as HTML, by title.

    Covers all documents together, each domain if there are several, and the start of a text.
    """
    whole, size = (expert_contribution(contributions, measure=measure) for measure in ("logit", "norm"))
    intro = (
        "A chosen expert's weighted output, through the last norm held at its scale, onto the unembedding row of the "
        "token that came next less the mean row: what the expert adds to that token's logit directly, without effects "
        f"through later layers. {labels.sample(whole)}."
    )
    sections = {
        "Contribution of experts": paragraphs(intro)
        + bullets([*cells_apart(whole, "logits"), *_super(size)])
        + _figure(show.expert_contribution(whole), "Mean addition to the next token's logit, by layer and expert.")
        + _figure(show.expert_contribution(size), "Mean Euclidean norm of the weighted output, by layer and expert.")
        + details("Table of logits", html_table(whole, "Addition to the next token's logit"))
        + details("Table of norms", html_table(size, "Norm of the weighted output"))
    }
    if has_domains(contributions):
        data = expert_contribution(contributions, by="domain")
        sections["Contribution by domain"] = _figure(
            show.contribution_by_domain(data), "Mean addition to the next token's logit, a row a domain."
        ) + details("Table", html_table(data, "Addition to the next token's logit, by domain"))
    text = f"The first {_TOKENS} tokens of the first sequence, the two or more experts of a layer added up."
    sections["Contribution along a text"] = _figure(show.contributions(contributions, positions=(0, _TOKENS)), text)
    return sections


def contribution_findings(contributions: xr.Dataset) -> list[tuple[str, str]]:
    """Return the largest contributions that survive, with the heading of their section."""
    said = cells_apart(expert_contribution(contributions, measure="logit"), "logits")
    return [("Contribution of experts", sentence) for sentence in said[1:] or said]


def topk_findings(measured: xr.Dataset) -> list[tuple[str, str]]:
    """Return the change in loss for each number of experts, with the heading of its section."""
    whole = topk_sweep(measured)
    return [("Number of experts a token chooses", line) for line in _changes(whole, int(whole.attrs["own_k"]))]


def topk_sections(measured: xr.Dataset, name: str) -> dict[str, str]:
    """Return loss and routing for each number of experts k as HTML, by title; also by domain if there are several."""
    whole = topk_sweep(measured)
    own = int(whole.attrs["own_k"])
    intro = (
        f"Every token chose k experts, weights renormalised, on the same tokens. The model's own k is {own}. "
        f"{labels.sample(whole)}."
    )
    html = (
        paragraphs(intro)
        + bullets(_changes(whole, own))
        + _figure(show.topk_sweep(whole), "Loss by number of experts a token chooses.")
        + _figure(show.topk_routing(whole), "How much of the weight the strongest expert has, by layer.")
        + details("Table", html_table(whole, "Loss by number of experts"))
    )
    if has_domains(measured):
        data = topk_sweep(measured, by="domain")
        html += _figure(show.topk_sweep(data), "The same by domain.")
        html += details("Table by domain", html_table(data, "Loss by number of experts and domain"))
    return {"Number of experts a token chooses": html}


def _super(size: xr.Dataset) -> list[str]:
    """Describe the super experts.

    One expert always passes the test, so only those far above the median are called super experts.
    """
    found = super_experts(size)
    named = []
    for layer, expert in np.argwhere(found["is_super"].to_numpy()):
        cell = found.isel(layer=layer, expert=expert)
        if float(cell["over_median"]) >= _FAR:
            named.append(
                f"super expert (Su et al. 2025): layer {cell.layer.item()}, expert {cell.expert.item()} put out "
                f"{float(cell['max_abs']):.4g}, {float(cell['over_median']):.0f} times the median expert's"
            )
    return named or [f"No super expert: no expert's largest number is {_FAR} times the median expert's."]


def _changes(data: xr.Dataset, own: int) -> list[str]:
    lines = []
    for k in data["k"].to_numpy():
        if k != own:
            cell = data.sel(k=k)
            low, high = float(cell["change_low"]), float(cell["change_high"])
            interval = f" [{low:+.3f}, {high:+.3f}]" if np.isfinite(low) else ""
            lines.append(f"k = {k}: {float(cell['change']):+.3f}{interval} nats per token against k = {own}")
    return lines


def _figure(ax, text: str) -> str:
    return picture(ax, text, text)
