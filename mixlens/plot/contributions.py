"""Figures of expert contributions, as heat maps and along a text, and of the effect of more or fewer experts."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from mixlens.errors import BadInput
from mixlens.plot import labels
from mixlens.plot.checks import takes
from mixlens.plot.colours import layer_colours, series_colours
from mixlens.plot.heatmap import (
    by_group,
    dots,
    group_of,
    layers_by_experts,
    map_height,
    map_width,
    mesh,
    row_ticks,
    scale_note,
)
from mixlens.plot.style import (
    COLUMN,
    MARKERS,
    MUTED,
    PAGE,
    SMALLEST,
    drawing,
    heading,
    in_legend,
    legend_below,
    printable,
)

_LABELS = {"logit": "added to the next token's logit", "norm": "norm of the weighted output"}

_TITLES = {"logit": "Contribution to the logit", "norm": "Size of the contribution"}


@takes("stats.expert_contribution", "estimate", "layer", "expert", "measure")
def expert_contribution(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the contribution of each expert to the tokens that choose it; a dot marks values that differ from 0.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_contribution`, [layer, expert]. Select one domain with `data.sel(domain=...)`.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or still has domains to select from.

    Examples
    --------
    >>> short = ml.RecordSettings(max_length=8, overlong="truncate", progress=False)
    >>> measured = ml.experiments.measure_contributions(model, documents[:1], settings=short)
    >>> ml.show.expert_contribution(ml.stats.expert_contribution(measured)).get_xlabel()
    'expert'
    """
    data = labels.only(data, "contribution", "layer", "expert").transpose("layer", "expert")
    with drawing(ax, map_width(data.sizes["expert"]), 0.9 + map_height(data.sizes["layer"])) as ax:
        measure, survives = data.attrs["measure"], labels.surviving(data)
        unit = mesh(ax, data["estimate"].to_numpy(), _LABELS[measure], signed=measure == "logit", bold=survives)
        if measure == "logit" and not unit:
            dots(ax, survives)
        layers_by_experts(ax, data)
        heading(ax, title or _titled(data, _TITLES[measure]), _note(data, unit))
    return ax


@takes("stats.expert_contribution", "estimate", "layer", "expert", "measure")
def contribution_by_domain(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw expert contributions in every domain: one row per domain, one column per expert, layers side by side.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_contribution` with ``by="domain"``, [domain, layer, expert].
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or has no domains.

    Examples
    --------
    >>> short = ml.RecordSettings(max_length=8, overlong="truncate", progress=False)
    >>> measured = ml.experiments.measure_contributions(model, documents[:1], settings=short)
    >>> by_domain = ml.stats.expert_contribution(measured, by="domain")
    >>> ml.show.contribution_by_domain(by_domain).get_xlabel()
    'layer (in each, experts 0 to 7)'
    """
    with drawing(ax, PAGE, 1.0 + 0.17 * max(data.sizes[group_of(data)], 4)) as ax:
        measure = data.attrs["measure"]
        unit = by_group(ax, data, "contribution_by_domain", _LABELS[measure], signed=measure == "logit")
        heading(ax, title or _titled(data, f"{_TITLES[measure]} by {group_of(data)}"), _note(data, unit))
    return ax


@takes("experiments.measure_contributions", "logit", "sequence", "position")
def contributions(
    data: xr.Dataset,
    ax: Axes | None = None,
    *,
    sequence: int | None = None,
    positions: tuple[int, int] = (0, 64),
    title: str | None = None,
) -> Axes:
    """Draw the contribution of each layer's chosen experts to the next-token logit, along a text.

    Parameters
    ----------
    data : xarray.Dataset
        From `experiments.measure_contributions`, [token, layer, slot]. The slots of a layer are summed.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    sequence : int, optional
        Sequence number. By default the first sequence.
    positions : tuple of int, optional
        (first, stop) within the sequence.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or does not have the sequence or the positions.

    Examples
    --------
    >>> short = ml.RecordSettings(max_length=8, overlong="truncate", progress=False)
    >>> measured = ml.experiments.measure_contributions(model, documents[:1], settings=short)
    >>> ax = ml.show.contributions(measured, positions=(0, 4))
    >>> len(ax.get_xticklabels())
    4
    """
    number = int(data["sequence"].to_numpy()[0]) if sequence is None else sequence
    place = data["position"].to_numpy()
    here = (data["sequence"].to_numpy() == number) & (place >= positions[0]) & (place < positions[1])
    if not here.any():
        numbers = ", ".join(map(str, np.unique(data["sequence"].to_numpy())[:8]))
        raise BadInput(
            f"Cannot draw contributions: no tokens in sequence {number}, positions {positions[0]} to "
            f"{positions[1] - 1}. Pass one of the sequences {numbers}, and positions within it.",
            argument="positions" if sequence is None else "sequence",
            value=positions if sequence is None else sequence,
        )
    part = data.isel(token=np.flatnonzero(here)).transpose("layer", "token", "slot")
    with drawing(ax, PAGE, 1.2 + 0.13 * max(part.sizes["layer"], 8)) as ax:
        values = part["logit"].sum("slot", skipna=False).to_numpy()
        unit = mesh(ax, values, "logit of the next token")
        pieces = [printable(piece).replace("\n", "↵") for piece in part["piece"].to_numpy()]
        step = int(-(-len(pieces) * SMALLEST // (PAGE * 72 * 0.85)))  # labels that do not touch
        places = np.arange(0, len(pieces), step) + 0.5
        ax.set_xticks(places, pieces[::step], rotation=90, fontsize=SMALLEST)
        row_ticks(ax, part["layer"].to_numpy())
        ax.set_ylabel("layer")
        note = f"sequence {number}; column: the token read; direct effect on the token that came next; grey: none came"
        heading(ax, title or "Contribution of experts", "; ".join(filter(None, [note, scale_note(values), unit])))
    return ax


@takes("stats.topk_sweep", "estimate", "k")
def topk_sweep(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the loss when every token chooses k experts, one line per domain; a dashed line marks the model's own k.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.topk_sweep`, ``[*by, k]``.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset.

    Examples
    --------
    >>> short = ml.RecordSettings(max_length=8, overlong="truncate", progress=False)
    >>> measured = ml.experiments.measure_topk(model, documents[:1], ks=(1, 2), settings=short)
    >>> ml.show.topk_sweep(ml.stats.topk_sweep(measured)).get_ylabel()
    'loss, nats per token'
    """
    series = list(labels.groups(data, "k"))
    with drawing(ax, COLUMN, 2.4 if len(series) == 1 else 2.7 if len(series) < 5 else 3.3) as ax:
        colours, step = series_colours(len(series)), 0.4 / max(len(series), 8)
        for i, (name, part) in enumerate(series):
            at = part["k"].to_numpy() + (i - (len(series) - 1) / 2) * step
            marker = MARKERS[i % len(MARKERS)]
            ax.plot(at, part["estimate"], color=colours[i], marker=marker, label=in_legend(name) or "all documents")
            ax.vlines(at, part["ci_low"], part["ci_high"], color=colours[i], linewidth=1)
        ax.axvline(int(data.attrs["own_k"]), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set_xticks(data["k"].to_numpy())
        ax.set_xlabel("experts a token chooses, k")
        ax.set_ylabel("loss, nats per token")
        if len(series) > 1:
            legend_below(ax, 4)
        note = f"{labels.sample(data)}; {labels.over(data, 'whiskers')}; dashed: the model's own k"
        heading(ax, title or "Loss by number of experts", note)
    return ax


@takes("stats.topk_sweep", "first_weight", "k")
def topk_routing(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the mean weight of the strongest expert when every token chooses k experts.

    There is one line per layer, from the first (blue) to the last (red).

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.topk_sweep`, [k]. Select one domain with `data.sel(domain=...)`.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or still has domains to select from.

    Examples
    --------
    >>> short = ml.RecordSettings(max_length=8, overlong="truncate", progress=False)
    >>> measured = ml.experiments.measure_topk(model, documents[:1], ks=(1, 2), settings=short)
    >>> ml.show.topk_routing(ml.stats.topk_sweep(measured)).get_ylabel()
    'weight of the strongest'
    """
    data = labels.only(data, "topk_routing", "k")
    with drawing(ax, COLUMN, 2.8) as ax:
        k, first = data["k"].to_numpy(), data["first_weight"].transpose("layer", "k").to_numpy()
        shades = layer_colours(len(first))
        for i, (layer, line) in enumerate(zip(data["layer"].to_numpy(), first, strict=True)):
            ax.plot(k, line, color=shades[i], marker=".", markersize=3, linewidth=0.9, label=f"layer {layer}")
        ax.plot(k, 1 / k, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.axvline(int(data.attrs["own_k"]), color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        ax.set_xticks(k)
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("experts a token chooses, k")
        ax.set_ylabel("weight of the strongest")
        if len(first) <= len(MARKERS):
            legend_below(ax, 4)
        note = f"{labels.sample(data)}; dashed: equal weights, 1/k; dotted: the model's own k"
        selected = labels.chosen(data)
        heading(ax, title or "Weight of the strongest expert" + (f", {selected}" if selected else ""), note)
    return ax


def _titled(data: xr.Dataset, title: str) -> str:
    selected = labels.chosen(data)
    return f"{title}, {selected}" if selected else title


def _note(data: xr.Dataset, unit: str) -> str:
    parts = [labels.sample(data), "mean over tokens that chose the expert"]
    if data.attrs["measure"] == "logit":
        mark = labels.marked(data, "bold" if unit else "dot", "differs from 0, ")
        parts += [mark, scale_note(data["estimate"].to_numpy())]
    return "; ".join(filter(None, [*parts, unit]))
