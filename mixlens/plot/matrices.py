"""Heat maps of layers, domains and experts, always on a diverging scale centred on uniform routing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mixlens.errors import BadInput
from mixlens.plot import labels
from mixlens.plot.checks import check, takes
from mixlens.plot.style import (
    COLUMN,
    DIVERGING,
    FAINT,
    PAGE,
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

_SMALLEST_DIGITS = 4.6  # points; smaller print is left out


@takes("stats.expert_share", "estimate", "layer", "expert")
def share_heatmap(data: xr.Dataset, ax: Axes | None = None, *, limit: float | None = None) -> Axes:
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
    with drawing(ax, COLUMN, 0.9 + 0.16 * max(data.sizes["layer"], 8)) as ax:
        _matrix(ax, data.transpose("layer", "expert", ...), "layer", "expert", limit)
    return ax


@takes("stats.domain_specialization", "estimate", "expert")
def specialization(
    data: xr.Dataset, ax: Axes | None = None, *, layer: int | None = None, domain: str | None = None
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
        return share_heatmap(data.sel({group: domain}), ax)
    data = labels.only(labels.at_layer(data, layer), "specialization", group, "expert")
    with drawing(ax, COLUMN, 0.9 + 0.16 * max(data.sizes[group], 8)) as ax:
        _matrix(ax, data.transpose(group, "expert", ...), group, "expert", None)
    return ax


@takes("stats.coactivation", "estimate", "expert", "expert_j")
def coactivation(data: xr.Dataset, ax: Axes | None = None, *, layer: int | None = None) -> Axes:
    """Draw how often a token of expert i (row) also chooses expert j (column), at one layer.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.coactivation`, [layer, expert, expert_j].
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    layer : int, optional
        Layer number. By default the middle layer.

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
    return _expert_by_expert(data, ax, layer, "coactivation", "chosen expert i", "other expert j")


@takes("stats.transitions", "estimate", "expert", "expert_j")
def transitions(data: xr.Dataset, ax: Axes | None = None, *, layer: int | None = None) -> Axes:
    """Draw the first choice at a later layer (column) given the first choice at this one (row).

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.transitions`, [layer, expert, expert_j].
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    layer : int, optional
        Layer number. By default the middle layer.

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
    ax = _expert_by_expert(data, ax, layer, "transitions", "first choice at this layer", "first choice at the next")
    gap = int(data.attrs.get("gap", 1))
    if gap > 1:
        ax.set_xlabel(f"first choice {gap} layers later")
    return ax


def _expert_by_expert(data: xr.Dataset, ax: Axes | None, layer: int | None, name: str, rows: str, columns: str) -> Axes:
    data = labels.only(labels.at_layer(data, layer), name, "expert", "expert_j")
    with drawing(ax, COLUMN, 2.9) as ax:
        _matrix(ax, data.transpose("expert", "expert_j", ...), "expert", "expert_j", None)
        ax.set_ylabel(rows)
        ax.set_xlabel(columns)
    return ax


def facet(draw: Callable[..., Axes], data: xr.Dataset, dim: str, *, columns: int = 4, width: float = PAGE) -> Figure:
    """Draw one panel for every value of `dim`; panels of `share_heatmap` share their colour scale.

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
    shared: dict[str, Any] = {"limit": _limit(data)} if draw is share_heatmap else {}  # one scale for all
    with paper():
        figure = paper_figure(width, 0.6 + rows * (0.55 + 0.11 * data.sizes.get("layer", 10)))
        panels = [add_axes(figure, rows, columns, i + 1) for i in range(len(values))]
        for ax, value in zip(panels, values, strict=True):
            draw(data.sel({dim: value}), ax, **shared)
            drop_note(ax, value)
        if shared:
            _share_colorbar(figure, panels, data)
        text = f"{labels.title(data)} by {dim}. {_small_print(data)}"
        figure.suptitle("\n".join(textwrap.wrap(printable(text), int(width * 18))), fontsize=7, x=0.01, ha="left")
    return figure


def _share_colorbar(figure: Figure, panels: list[PaperAxes], data: xr.Dataset) -> None:
    for ax in [ax for ax in figure.axes if ax not in panels]:
        ax.remove()
    for ax in panels:
        place = ax.get_subplotspec()
        assert place is not None
        ax.set_ylabel(ax.get_ylabel() if place.is_first_col() else "")
        ax.set_xlabel(ax.get_xlabel() if place.is_last_row() else "")
    _colorbar(figure, panels[0].collections[0], panels, data)


def _limit(data: xr.Dataset) -> float:
    """Return the largest distance from the centre, but at least a fifth of it, so that noise does not look vivid."""
    distance = float(np.abs(data["estimate"] - _centre(data)).max())
    return max(distance if np.isfinite(distance) else 0.0, abs(_centre(data)) / 5, 1e-9)


def _centre(data: xr.Dataset) -> float:
    value = labels.uniform(data)
    return float(data["estimate"].mean() if value is None else value)


def _small_print(data: xr.Dataset) -> str:
    parts = [labels.sample(data), f"white: {labels.uniform_note(data)}", labels.marked(data, "bold")]
    return "; ".join(filter(None, parts))


def _matrix(ax: Axes, data: xr.Dataset, row: str, column: str, limit: float | None) -> None:
    centre, limit = _centre(data), _limit(data) if limit is None else limit
    values = data["estimate"].to_numpy()
    ax.set_facecolor(FAINT)  # missing numbers are grey, which is no colour of the scale
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=DIVERGING,
        norm=CenteredNorm(centre, limit),
        edgecolors="white",
        linewidth=0.4,
    )
    ax.invert_yaxis()
    ax.set_yticks(*_ticks(data[row].to_numpy(), 24))
    ax.set_xticks(*_ticks(data[column].to_numpy(), 16))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(column)
    ax.set_ylabel(row if row in ("layer", "expert") else "")
    figure = ax.get_figure(root=True)
    assert figure is not None
    _colorbar(figure, mesh, [ax], data)
    _digits(ax, data, centre, limit)
    selected = labels.chosen(data)
    heading(ax, f"{labels.title(data)}, {selected}" if selected else labels.title(data), _small_print(data))


def _colorbar(figure: Figure, mesh: ScalarMappable, beside: list, data: xr.Dataset) -> None:
    bar = figure.colorbar(mesh, ax=beside, format=FuncFormatter(percent), fraction=0.06, pad=0.02, aspect=25)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=6, length=2, width=0.5)
    low, high = mesh.get_clim()
    bar.ax.set_ylim(max(0.0, low or 0.0), min(1.0, high or 1.0))  # a symmetric scale exceeds the range of shares
    bar.set_label(f"share {labels.denominator(data)}", fontsize=7)


def _ticks(values: np.ndarray, most: int) -> tuple[np.ndarray, list[str]]:
    step = -(-len(values) // most)
    return np.arange(0, len(values), step) + 0.5, [printable(v) for v in values[::step]]


def _digits(ax: Axes, data: xr.Dataset, centre: float, limit: float) -> None:
    """Write per cent in every cell if it is readable; bold where it survives against the centre."""
    values = data["estimate"].to_numpy()
    figure = ax.get_figure(root=True)
    assert figure is not None
    box = ax.get_position()
    width, height = figure.get_size_inches() * 72 * 0.8
    decimals = 1 if limit < 0.05 else 0
    across = box.width * width / values.shape[1] / (1.5 + 0.8 * decimals)
    size = min(7.0, box.height * height / values.shape[0] * 0.8, across)
    if size < _SMALLEST_DIGITS:
        return
    survives = labels.surviving(data)
    shown = colormaps[DIVERGING](CenteredNorm(centre, limit)(np.nan_to_num(values, nan=centre)))
    dark = shown[..., :3] @ (0.299, 0.587, 0.114) < 0.55
    for (i, j), value in np.ndenumerate(values):
        ax.text(
            j + 0.5,
            i + 0.5,
            f"{100 * value:.{decimals}f}" if np.isfinite(value) else "–",
            ha="center",
            va="center_baseline",
            fontsize=size,
            color="white" if dark[i, j] else "black",
            fontweight="bold" if survives[i, j] else "normal",
            in_layout=False,
        )
