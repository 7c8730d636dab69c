"""Heat maps of layers, domains and experts, always on a diverging scale centred on uniform routing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from mixlens.errors import BadInput
from mixlens.plot import labels
from mixlens.plot.checks import check, takes
from mixlens.plot.heatmap import cells, colour_bar, column_ticks, dots, map_height, map_width, numbers, row_ticks
from mixlens.plot.messages import message
from mixlens.plot.style import (
    DIVERGING,
    PAGE,
    SMALLEST,
    PaperAxes,
    add_axes,
    drawing,
    drop_note,
    heading,
    paper,
    paper_figure,
    percent,
    printable,
)

_FEW_LINES = 16  # maximum rows of a panel whose cells have room for numbers
_MOST_DOTTED = 2000  # cells; in a larger map dots would hide the colours


@takes("stats.expert_share", "estimate", "layer", "expert")
def share_heatmap(
    data: xr.Dataset, ax: Axes | None = None, *, limit: float | None = None, title: str | None = None
) -> Axes:
    """Draw the share of every expert in every layer.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.expert_share` or `stats.domain_specialization`, [layer, expert]. Select one domain with
        `data.sel(domain=...)`.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    limit : float, optional
        Distance from uniform at the ends of the colour scale. By default the largest in the data.
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
    >>> ax = ml.show.share_heatmap(ml.stats.expert_share(trace))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('expert', 'layer')
    """
    data = labels.only(data, "share_heatmap", "layer", "expert")
    with drawing(ax, map_width(data.sizes["expert"]), 0.9 + map_height(data.sizes["layer"])) as ax:
        matrix(ax, data.transpose("layer", "expert", ...), "layer", "expert", limit, title)
    return ax


@takes("stats.domain_specialization", "estimate", "expert")
def specialization(
    data: xr.Dataset,
    ax: Axes | None = None,
    *,
    layer: int | None = None,
    domain: str | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the share of each domain's tokens per expert, at one layer, or in all layers for one domain.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.domain_specialization`, [domain, layer, expert].
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    layer : int, optional
        Layer number. By default the middle layer.
    domain : str, optional
        Domain to draw as layer x expert. By default all domains are drawn at one layer.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or does not have `layer`.

    Examples
    --------
    >>> data = ml.stats.domain_specialization(trace, by="domain")
    >>> ml.show.specialization(data, layer=3).get_xlabel()
    'expert'
    >>> ml.show.specialization(data, domain="wikipedia").get_ylabel()
    'layer'
    """
    group = str(next(d for d in data["estimate"].dims if d not in ("layer", "expert")))
    if domain is not None:
        return share_heatmap(data.sel({group: domain}), ax, title=title)
    data = labels.only(labels.at_layer(data, layer), "specialization", group, "expert")
    with drawing(ax, map_width(data.sizes["expert"]), 0.9 + map_height(data.sizes[group])) as ax:
        matrix(ax, data.transpose(group, "expert", ...), group, "expert", title=title)
    return ax


@takes("stats.coactivation", "estimate", "expert", "expert_j")
def coactivation(
    data: xr.Dataset,
    ax: Axes | None = None,
    *,
    layer: int | None = None,
    limit: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw how often a token of expert i (row) also chooses expert j (column), at one layer.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.coactivation`, [layer, expert, expert_j].
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    layer : int, optional
        Layer number. By default the middle layer.
    limit : float, optional
        Distance from uniform at the ends of the colour scale. By default the largest in the data.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, still has domains to select from, or does not have `layer`.

    Examples
    --------
    >>> ml.show.coactivation(ml.stats.coactivation(trace), layer=3).get_xlabel()
    'other expert j'
    """
    return _expert_by_expert(
        data, ax, layer, "coactivation", rows="chosen expert i", columns="other expert j", limit=limit, title=title
    )


@takes("stats.transitions", "estimate", "expert", "expert_j")
def transitions(
    data: xr.Dataset,
    ax: Axes | None = None,
    *,
    layer: int | None = None,
    limit: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the first choice at a later layer (column) given the first choice at this one (row).

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.transitions`, [layer, expert, expert_j].
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    layer : int, optional
        Layer number. By default the middle layer.
    limit : float, optional
        Distance from uniform at the ends of the colour scale. By default the largest in the data.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, still has domains to select from, or does not have `layer`.

    Examples
    --------
    >>> ml.show.transitions(ml.stats.transitions(trace), layer=3).get_xlabel()
    'first choice at the next'
    """
    gap = int(data.attrs.get("gap", 1))
    later = "the next" if gap == 1 else f"{gap} layers later"
    rows, columns = "first choice at this layer", f"first choice {'at ' if gap == 1 else ''}{later}"
    return _expert_by_expert(data, ax, layer, "transitions", rows=rows, columns=columns, limit=limit, title=title)


def _expert_by_expert(
    data: xr.Dataset,
    ax: Axes | None,
    layer: int | None,
    name: str,
    *,
    rows: str,
    columns: str,
    limit: float | None,
    title: str | None,
) -> Axes:
    data = labels.only(labels.at_layer(data, layer), name, "expert", "expert_j")
    width = map_width(data.sizes["expert"])
    with drawing(ax, width, 0.88 * width) as ax:
        matrix(ax, data.transpose("expert", "expert_j", ...), "expert", "expert_j", limit, title)
        ax.set_ylabel(rows)
        ax.set_xlabel(columns)
    return ax


def facet(
    draw: Callable[..., Axes],
    data: xr.Dataset,
    dim: str,
    *,
    columns: int = 4,
    width: float = PAGE,
    title: str | None = None,
) -> Figure:
    """Draw one panel for every value of `dim`; panels of maps share their colour scale.

    Parameters
    ----------
    draw : callable
        A function of `ml.show` that takes a Dataset and Axes, such as `share_heatmap`.
    data : xarray.Dataset
        A statistic with the dimension `dim`.
    dim : str
        Dimension to draw the panels by.
    columns : int, optional
        Number of panels in a row.
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
        If `data` is no statistic, or does not have `dim`.

    Examples
    --------
    >>> share = ml.stats.expert_share(trace, by="domain")
    >>> figure = ml.show.facet(ml.show.share_heatmap, share, "domain")
    >>> len(figure.axes) == share.sizes["domain"] + 1  # and a colour bar
    True
    """
    check(data, "facet", "stats.expert_share", "estimate")
    if dim not in data.dims:
        raise BadInput(
            f"Cannot draw one panel for every {dim!r}: the data has dimensions "
            f"{', '.join(map(str, data['estimate'].dims))}. Pass dim= one of them.",
            argument="dim",
            value=dim,
        )
    values = data[dim].to_numpy()
    columns = min(columns, len(values))
    rows = -(-len(values) // columns)
    shared: dict[str, Any] = {"limit": _limit(data)} if draw in _ON_ONE_SCALE else {}  # one scale for all
    with paper():
        lines = next(data.sizes[d] for d in ("layer", "expert") if d in data.dims and d != dim)
        figure = paper_figure(
            width, 0.6 + rows * (0.55 + (0.15 * lines if lines <= _FEW_LINES else min(0.09 * lines, 3.0)))
        )
        panels = [add_axes(figure, rows, columns, i + 1) for i in range(len(values))]
        for ax, value in zip(panels, values, strict=True):
            draw(data.sel({dim: value}), ax, **shared)
            drop_note(ax, value)
        if shared:
            _share_scale(figure, panels, data)
        written = any(ax.texts for ax in panels)
        text = f"{title or f'{labels.title(data)} by {dim}'}. {_small_print(data, 'bold' if written else 'dot')}"
        wrapped = textwrap.wrap(printable(text), int(width * 18))
        # A line of its own for the uppermost label of the colour bar, which the layout does not count.
        figure.suptitle("\n".join([*wrapped, ""]), fontsize=SMALLEST, x=0.01, ha="left")
    return figure


def _share_scale(figure: Figure, panels: list[PaperAxes], data: xr.Dataset) -> None:
    for ax in [ax for ax in figure.axes if ax not in panels]:
        ax.remove()
    for ax in panels:
        place = ax.get_subplotspec()
        assert place is not None
        ax.set_ylabel(ax.get_ylabel() if place.is_first_col() else "")
        ax.set_xlabel(ax.get_xlabel() if place.is_last_row() else "")
    mesh = panels[0].collections[0]
    assert isinstance(mesh, QuadMesh)
    _share_bar(mesh, panels, data)


_ON_ONE_SCALE = (share_heatmap, coactivation, transitions)


def _limit(data: xr.Dataset) -> float:
    """Return the largest distance from the centre, at least a fifth of the centre so that noise does not look vivid."""
    distance = float(np.abs(data["estimate"] - _centre(data)).max())
    return max(distance if np.isfinite(distance) else 0.0, abs(_centre(data)) / 5, 1e-9)


def _centre(data: xr.Dataset) -> float:
    value = labels.uniform(data)
    return float(data["estimate"].mean() if value is None else value)


def _small_print(data: xr.Dataset, mark: str) -> str:
    parts = [labels.sample(data), f"white: {labels.uniform_note(data)}", labels.marked(data, mark) if mark else ""]
    return "; ".join(filter(None, parts))


def matrix(
    ax: Axes,
    data: xr.Dataset,
    row: str,
    column: str,
    limit: float | None = None,
    title: str | None = None,
    *,
    also: str = "",
) -> None:
    """Draw shares [row, column] as a map with white at uniform; `also` ends the note."""
    centre, limit = _centre(data), _limit(data) if limit is None else limit
    values = data["estimate"].to_numpy()
    drawn = cells(ax, values, DIVERGING, CenteredNorm(centre, limit))
    row_ticks(ax, data[row].to_numpy())
    column_ticks(ax, data[column].to_numpy())
    ax.set_xlabel(column)
    ax.set_ylabel(row if row in ("layer", "expert") else "")
    _share_bar(drawn, [ax], data)
    survives = labels.surviving(data)
    for decimals in (1, 0) if limit < 0.05 else (0,):
        shown = np.vectorize(lambda value, d=decimals: f"{100 * value:.{d}f}" if np.isfinite(value) else "–")(values)
        if written := numbers(ax, drawn, shown, survives):
            break
    else:
        written = False
    mark = "bold" if written else "dot" if values.size <= _MOST_DOTTED else ""
    if mark == "dot":
        dots(ax, survives)
    heading(ax, title or message(data), "; ".join(filter(None, [_small_print(data, mark), also])))


def _share_bar(drawn: ScalarMappable, beside: Sequence[Axes], data: xr.Dataset) -> None:
    bar = colour_bar(drawn, beside, f"share {labels.denominator(data)}", percent)
    low, high = drawn.get_clim()
    bar.set_ylim(max(0.0, low or 0.0), min(1.0, high or 1.0))  # a symmetric scale exceeds the range of shares
