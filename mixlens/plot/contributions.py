"""What experts contribute, as heat maps and along a text, and what more or fewer of them do."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes

from mixlens.errors import BadInput
from mixlens.plot import labels
from mixlens.plot.checks import takes
from mixlens.plot.heatmap import by_group, dots, excludes_zero, group_of, mesh, numbered, scale_note
from mixlens.plot.style import COLUMN, MARKERS, MUTED, PAGE, drawing, expert_colours, heading, in_legend, printable

_LABELS = {"logit": "added to the next token's logit", "norm": "norm of the weighted output"}

_TITLES = {"logit": "Contribution to the logit", "norm": "Size of the contribution"}


@takes("stats.expert_contribution", "estimate", "layer", "expert", "measure")
def contribution(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """What every expert of every layer contributes to the tokens that choose it; a dot where its interval excludes 0.

    data    from stats.expert_contribution [layer, expert]; of one domain, data.sel(domain=...)
    """
    data = labels.only(data, "contribution", "layer", "expert").transpose("layer", "expert")
    with drawing(ax, COLUMN, 0.9 + 0.16 * max(data.sizes["layer"], 8)) as ax:
        signed = data.attrs["measure"] == "logit"
        mesh(ax, data["estimate"].to_numpy(), _LABELS[data.attrs["measure"]], signed=signed)
        if signed:
            dots(ax, excludes_zero(data))
        numbered(ax, data["layer"].to_numpy())
        ax.set_xticks(np.arange(data.sizes["expert"]) + 0.5, map(str, data["expert"].to_numpy()))
        ax.set_xlabel("expert")
        _titled(ax, data, _TITLES[data.attrs["measure"]])
    return ax


@takes("stats.expert_contribution", "estimate", "layer", "expert", "measure")
def contribution_by_domain(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """The same for every domain: a row a domain, a column an expert, layers side by side.

    data    from stats.expert_contribution(..., by="domain")  [domain, layer, expert]
    """
    with drawing(ax, PAGE, 1.0 + 0.17 * max(data.sizes[group_of(data)], 4)) as ax:
        measure = data.attrs["measure"]
        by_group(ax, data, "contribution_by_domain", _LABELS[measure], signed=measure == "logit")
        _titled(ax, data, f"{_TITLES[measure]} by {group_of(data)}")
    return ax


@takes("measure_contributions", "logit", "sequence", "position")
def contributions(
    data: xr.Dataset, ax: Axes | None = None, *, sequence: int | None = None, positions: tuple[int, int] = (0, 64)
) -> Axes:
    """What the chosen experts of each layer add to the logit of the next token, along a text.

    data       from measure_contributions  [token, layer, slot]; the slots of a layer are added up
    sequence   sequence number; the first one when not given
    positions  (first, stop) within the sequence

    Raises BadInput for a sequence or positions that are not there.
    """
    number = int(data["sequence"].to_numpy()[0]) if sequence is None else sequence
    place = data["position"].to_numpy()
    here = (data["sequence"].to_numpy() == number) & (place >= positions[0]) & (place < positions[1])
    if not here.any():
        numbers = ", ".join(map(str, np.unique(data["sequence"].to_numpy())[:8]))
        raise BadInput(
            f"Contributions in sequence {number}, positions {positions[0]} to {positions[1] - 1}, were to be drawn. "
            f"The data has sequences {numbers}. Give one of them, and positions within it.",
            argument="positions" if sequence is None else "sequence",
            value=positions if sequence is None else sequence,
        )
    part = data.isel(token=np.flatnonzero(here)).transpose("layer", "token", "slot")
    with drawing(ax, PAGE, 1.2 + 0.13 * max(part.sizes["layer"], 8)) as ax:
        values = part["logit"].sum("slot", skipna=False).to_numpy()
        mesh(ax, values, "logit of the next token")
        pieces = [printable(piece).replace("\n", "↵") for piece in part["piece"].to_numpy()]
        size = min(6.0, 380 / len(pieces))
        ax.set_xticks(np.arange(len(pieces)) + 0.5, pieces, rotation=90, fontsize=size)
        numbered(ax, part["layer"].to_numpy())
        note = f"sequence {number}; column: the token read; direct effect on the token that came next; grey: none came"
        heading(ax, "Contribution of experts", "; ".join(filter(None, [note, scale_note(values)])))
    return ax


@takes("topk_sweep", "estimate", "k")
def topk_curve(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Loss when every token chooses k experts, one line a domain; the model's own k is dashed.

    data    from topk_sweep  [*by, k]
    """
    series = list(labels.groups(data, "k"))
    with drawing(ax, COLUMN, 2.4 if len(series) == 1 else 2.7 if len(series) < 5 else 3.3) as ax:
        colours, step = expert_colours(len(series)), 0.4 / max(len(series), 8)
        for i, (name, part) in enumerate(series):
            at = part["k"].to_numpy() + (i - (len(series) - 1) / 2) * step
            marker = MARKERS[i % len(MARKERS)]
            ax.plot(at, part["estimate"], color=colours[i], marker=marker, label=in_legend(name) or "all documents")
            ax.vlines(at, part["ci_low"], part["ci_high"], color=colours[i], linewidth=1)
        ax.axvline(int(data.attrs["own_k"]), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set_xticks(data["k"].to_numpy())
        ax.set_xlabel("experts a token chooses, k")
        ax.set_ylabel("loss, nats a token")
        if len(series) > 1:
            ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.22), fontsize=6, columnspacing=1)
        note = f"{labels.sample(data)}; whiskers: {labels.level(data)} over documents; dashed: the model's own k"
        heading(ax, "Loss by number of experts", note)
    return ax


@takes("topk_sweep", "first_weight", "k")
def topk_routing(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Mean weight of the strongest expert when every token chooses k, one line a layer, from first (light) to last.

    data    from topk_sweep  [k]; of one domain, data.sel(domain=...)
    """
    data = labels.only(data, "topk_routing", "k")
    with drawing(ax, COLUMN, 2.8) as ax:
        k, first = data["k"].to_numpy(), data["first_weight"].transpose("layer", "k").to_numpy()
        shades = colormaps["viridis_r"](np.linspace(0.1, 1, len(first)))
        for i, (layer, line) in enumerate(zip(data["layer"].to_numpy(), first, strict=True)):
            ax.plot(k, line, color=shades[i], marker=".", markersize=3, linewidth=0.9, label=f"layer {layer}")
        ax.plot(k, 1 / k, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.axvline(int(data.attrs["own_k"]), color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        ax.set_xticks(k)
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("experts a token chooses, k")
        ax.set_ylabel("weight of the strongest")
        if len(first) <= len(MARKERS):
            ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.22), fontsize=6, columnspacing=1)
        note = f"{labels.sample(data)}; dashed: equal weights, 1/k; dotted: the model's own k"
        selected = labels.chosen(data)
        heading(ax, "Weight of the strongest expert" + (f", {selected}" if selected else ""), note)
    return ax


def _titled(ax: Axes, data: xr.Dataset, title: str) -> None:
    logit = data.attrs["measure"] == "logit"
    parts = [labels.sample(data), "mean over tokens that chose the expert"]
    parts += [f"dot: {labels.level(data)} excludes 0", scale_note(data["estimate"].to_numpy())] if logit else []
    selected = labels.chosen(data)
    heading(ax, f"{title}, {selected}" if selected else title, "; ".join(filter(None, parts)))
