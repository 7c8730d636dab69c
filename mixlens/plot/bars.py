"""Bars: expert share by domain.

Every function takes a statistic's Dataset and `ax`, draws on it or on new Axes in paper style, and returns the Axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from mixlens.errors import BadInput
from mixlens.plot import labels as wording
from mixlens.plot.checks import takes
from mixlens.plot.colours import SERIES_COLOURS, expert_colours, series_colours
from mixlens.plot.lines import legend, uniform_lines, value_axis
from mixlens.plot.messages import message, named
from mixlens.plot.style import (
    COLUMN,
    INK,
    MUTED,
    PAGE,
    add_axes,
    drawing,
    drop_note,
    heading,
    in_legend,
    paper,
    paper_figure,
    printable,
)

_MOST_EXPERTS = 16  # in a figure


@takes("stats.expert_share", "estimate", "expert")
def expert_share(
    data: xr.Dataset, ax: Axes | None = None, *, layer: int | None = None, x: str = "expert", title: str | None = None
) -> Axes:
    """Draw how often each expert of a layer is chosen, by group (Jiang et al. 2024, Fig. 7).

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_share`, ``[*by, layer, expert]``.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    layer : int, optional
        Layer number. By default the middle layer.
    x : {"expert", "domain"}, optional
        "expert" draws a cluster of bars for each expert, one bar per domain; "domain" a cluster for each domain.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, does not have `layer`, or `x` is unknown.

    Examples
    --------
    >>> share = ml.stats.expert_share(trace, by="domain")
    >>> ml.show.expert_share(share, layer=3).get_xlabel()
    'expert'
    """
    data = wording.at_layer(data, layer)
    shown, left_out = _widest(data)
    rows = list(wording.groups(shown, "expert"))
    with drawing(ax, PAGE if len(rows) > 1 else COLUMN, 2.3) as ax:
        _clustered_bars(shown, rows, ax, x)
        note = wording.note(data, drawn="whiskers")
        heading(ax, title or message(data), f"{note}; {left_out}" if left_out else note)
        if len(rows) > 1:
            legend(ax)
    return ax


@takes("stats.expert_share", "estimate", "layer", "expert")
def expert_share_grid(
    data: xr.Dataset,
    *,
    layers: Sequence[int] | None = None,
    x: str = "expert",
    width: float = PAGE,
    title: str | None = None,
) -> Figure:
    """Draw `expert_share` at several layers, one above the other, as in Figure 7 of the Mixtral paper.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_share`, ``[*by, layer, expert]``.
    layers : sequence of int, optional
        Layer numbers. By default the first, middle and last layer, as in the paper: 0, 15 and 31 of 32.
    x : {"expert", "domain"}, optional
        As in `expert_share`.
    width : float, optional
        Width of the figure in inches. By default the full width of a two-column paper.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or `x` is unknown.

    Examples
    --------
    >>> figure = ml.show.expert_share_grid(ml.stats.expert_share(trace, by="domain"), layers=[0, 7])
    >>> len(figure.axes)
    2
    """
    present = data["layer"].to_numpy()
    layers = list(dict.fromkeys(present[[0, (len(present) - 1) // 2, -1]])) if layers is None else list(layers)
    drawn = data.sel(layer=layers)  # with a single document there is no interval
    top = 1.12 * float(drawn["ci_high"].fillna(drawn["estimate"]).max())
    with paper():
        figure = paper_figure(width, 0.6 + 1.7 * len(layers))
        axes = [add_axes(figure, len(layers), 1, i + 1) for i in range(len(layers))]
        for ax, layer in zip(axes, layers, strict=True):
            expert_share(data, ax, layer=int(layer), x=x, title=title or named(data.sel(layer=layer)))
            ax.set_ylim(0, top if np.isfinite(top) else 1)
            if legend := ax.get_legend():
                legend.remove()
            if ax is not axes[0]:
                drop_note(ax, f"layer {layer}")
            if ax is not axes[-1]:
                ax.set_xlabel("")
        handles, labels = axes[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def _widest(data: xr.Dataset) -> tuple[xr.Dataset, str]:
    """Return the experts that fit into a bar figure, and a note on the selection."""
    count = data.sizes["expert"]
    if count <= _MOST_EXPERTS:
        return data, ""
    middle = wording.uniform(data)
    others = [dim for dim in data["estimate"].dims if dim != "expert"]
    far = abs(data["estimate"] - (0 if middle is None else middle)).max(others)
    order = np.sort(np.argsort(-far.fillna(0).to_numpy(), kind="stable")[:_MOST_EXPERTS])
    return data.isel(expert=order), f"the {_MOST_EXPERTS} of {count} experts that are furthest from uniform"


def _clustered_bars(data: xr.Dataset, rows: list[tuple[str, xr.Dataset]], ax: Axes, x: str) -> None:
    experts = data["expert"].to_numpy()
    groups = [name for name, _ in rows]
    table = np.stack([np.stack([part[v].to_numpy() for v in ("estimate", "ci_low", "ci_high")]) for _, part in rows])
    if x == "expert":  # table is [group, value, expert]; bars of one colour are one group
        clusters, bars = [str(e) for e in experts], groups
        colours = series_colours(len(groups)) if len(groups) > 1 else [MUTED]
    elif x == "domain":
        table = table.transpose(2, 1, 0)
        clusters, bars, colours = groups, [f"expert {e}" for e in experts], expert_colours(len(experts))
    else:
        raise BadInput(
            f'Cannot draw expert shares with x={x!r}. Pass x="expert" or x="domain".',
            argument="x",
            value=x,
        )
    width = 0.84 / len(bars)
    for i, (name, (estimate, low, high)) in enumerate(zip(bars, table, strict=True)):
        at = np.arange(len(clusters)) + (i - (len(bars) - 1) / 2) * width
        hatch = "/" * 6 * (i // len(SERIES_COLOURS))  # distinguishes series of the same colour
        style = {"color": colours[i], "hatch": hatch, "edgecolor": "white", "label": in_legend(name)}
        _bars(ax, at, estimate, (low, high), width=width, **style)
    ax.set_xticks(range(len(clusters)), [printable(c) for c in clusters])
    if x == "domain" and len(clusters) > 6:
        ax.tick_params(axis="x", rotation=30)
    ax.set_xlabel("expert" if x == "expert" else "")
    ax.set_xlim(-0.6, len(clusters) - 0.4)
    ax.tick_params(axis="x", length=0)
    value_axis(ax, data)
    uniform_lines(ax, data)


def _bars(
    ax: Axes, at: np.ndarray, estimate: np.ndarray, interval: tuple[np.ndarray, np.ndarray], **style
) -> BarContainer:
    bars = ax.bar(at, estimate, linewidth=0, **style)
    ax.vlines(at, *interval, color=INK, linewidth=0.6, zorder=3)
    return bars
