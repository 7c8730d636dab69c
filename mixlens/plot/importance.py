"""Figures of expert importance: heat maps of the change in loss, and importance against use."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mixlens.plot import labels
from mixlens.plot.checks import takes
from mixlens.plot.colours import layer_colours
from mixlens.plot.heatmap import (
    by_group,
    dots,
    group_of,
    layers_by_experts,
    map_height,
    map_width,
    mesh,
    scale_note,
    signed_axis,
)
from mixlens.plot.messages import message
from mixlens.plot.style import (
    COLUMN,
    INK,
    MARKERS,
    MUTED,
    PAGE,
    SMALLEST,
    drawing,
    heading,
    legend_below,
    name_points,
    percent,
    printable,
)

_FEW_POINTS = 40  # maximum number of points to label


@takes("stats.expert_importance", "estimate", "layer", "expert", "metric")
def expert_importance(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the change in loss without each expert of each layer; a dot marks changes that survive.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_importance`, [layer, expert]. Select one domain with `data.sel(domain=...)`.
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
    >>> measured = ml.experiments.measure_importance(
    ...     model, documents[:1], ablation=ml.experiments.Ablation(layers=[7]), settings=short
    ... )
    >>> ml.show.expert_importance(ml.stats.expert_importance(measured)).get_xlabel()
    'expert'
    """
    data = labels.only(data, "importance", "layer", "expert").transpose("layer", "expert")
    with drawing(ax, map_width(data.sizes["expert"]), 0.9 + map_height(data.sizes["layer"])) as ax:
        survives = labels.surviving(data)
        unit = mesh(ax, data["estimate"].to_numpy(), _label(data), bold=survives)
        if not unit:
            dots(ax, survives)
        layers_by_experts(ax, data)
        heading(ax, title or message(data), _note(data, unit))
    return ax


@takes("stats.expert_importance", "estimate", "layer", "expert", "metric")
def importance_by_domain(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the change in loss in every domain: one row per domain, one column per expert, layers side by side.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_importance` with ``by="domain"``, [domain, layer, expert].
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
    >>> measured = ml.experiments.measure_importance(
    ...     model, documents[:1], ablation=ml.experiments.Ablation(layers=[7]), settings=short
    ... )
    >>> by_domain = ml.stats.expert_importance(measured, by="domain")
    >>> ml.show.importance_by_domain(by_domain).get_xlabel()
    'layer (in each, experts 0 to 7)'
    """
    with drawing(ax, PAGE, 1.0 + 0.17 * max(data.sizes[group_of(data)], 4)) as ax:
        unit = by_group(ax, data, "importance_by_domain", _label(data))
        heading(ax, title or f"Importance by {group_of(data)}", _note(data, unit))
    return ax


@takes("stats.expert_importance", "estimate", "share", "layer", "expert")
def importance_against_share(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the change in loss without an expert against how often it is chosen: one point per layer and expert.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_importance`, [layer, expert]. Select one domain with `data.sel(domain=...)`.
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
    >>> measured = ml.experiments.measure_importance(
    ...     model, documents[:1], ablation=ml.experiments.Ablation(layers=[7]), settings=short
    ... )
    >>> ml.show.importance_against_share(ml.stats.expert_importance(measured)).get_xlabel()
    'share of assignments'
    """
    data = labels.only(data, "importance_against_share", "layer", "expert").transpose("layer", "expert")
    with drawing(ax, COLUMN, 2.9) as ax:
        share, estimate = data["share"].to_numpy(), data["estimate"].to_numpy()
        colours = layer_colours(data.sizes["layer"])
        for i, layer in enumerate(data["layer"].to_numpy()):
            ax.vlines(share[i], data["ci_low"][i], data["ci_high"][i], color=colours[i], linewidth=0.6)
            marker = MARKERS[i % len(MARKERS)]
            ax.plot(share[i], estimate[i], marker=marker, linestyle="", color=colours[i], label=f"layer {layer}")
        signed_axis(ax, np.stack([data["ci_low"], data["ci_high"]]))
        ax.axhline(0, color=INK, linewidth=0.6)
        ax.axvline(1 / data.sizes["expert"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.xaxis.set_major_formatter(percent)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel("share of assignments")
        ax.set_ylabel(_label(data).replace(", ", ",\n"))  # in one line it is longer than the axis
        if data.sizes["layer"] <= len(MARKERS):
            legend_below(ax, 4)
        if estimate.size <= _FEW_POINTS:
            experts = data["expert"].to_numpy()
            points = [(float(share[i, j]), float(value), str(experts[j])) for (i, j), value in np.ndenumerate(estimate)]
            name_points(ax, points, SMALLEST)
        note = f"{labels.sample(data)}; {labels.over(data, 'whiskers')}; dashed: uniform share"
        note = "; ".join(filter(None, [note, scale_note(np.stack([data["ci_low"], data["ci_high"]]))]))
        selected = labels.chosen(data)
        heading(ax, title or "Importance against use" + (f", {selected}" if selected else ""), note)
    return ax


def _label(data: xr.Dataset) -> str:
    if data.attrs["unit"] == "nats":
        return "change in loss, nats per token"
    return printable(f"change in {str(data.attrs['metric']).rsplit('.', 1)[-1]}, per token")


def _note(data: xr.Dataset, unit: str) -> str:
    how = {"reroute": "never chosen", "zero": "output zero", "mean": "output its mean"}.get(str(data.attrs["how"]), "")
    mark = labels.marked(data, "bold" if unit else "dot")
    parts = [labels.sample(data), f"each expert in turn: {how}", mark, scale_note(data["estimate"].to_numpy()), unit]
    return "; ".join(filter(None, parts))
