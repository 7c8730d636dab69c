"""Lines: statistics that change from layer to layer.

Every function takes a statistic's Dataset and `ax`, draws on it or on new Axes in paper style, and returns the Axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mixlens.errors import BadInput
from mixlens.plot import labels as wording
from mixlens.plot.checks import takes
from mixlens.plot.colours import SERIES_COLOURS, series_colours
from mixlens.plot.heatmap import cell_size, map_height
from mixlens.plot.matrices import matrix
from mixlens.plot.messages import message, named
from mixlens.plot.style import (
    COLUMN,
    INK,
    MARKERS,
    MUTED,
    PAGE,
    SMALLEST,
    drawing,
    heading,
    in_legend,
    legend_below,
    percent,
    printable,
    relative_size,
)

_FEW = 4  # maximum number of lines with a legend below the axes; more are labelled at their ends
_MOST_LINES = len(SERIES_COLOURS)  # of a repetition; more are a map


@takes("stats.load_balance or another statistic by layer", "estimate", "layer")
def by_layer(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw any statistic against the layer, with one line for every combination of its other dimensions.

    Parameters
    ----------
    data : xarray.Dataset
        Any statistic with a `layer` dimension and at most 16 combinations of its other dimensions, all in one unit.
        Select with `data.sel` beforehand, as in the example.
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
        If `data` has no layers, has more than 16 lines, or has lines in several units.

    Examples
    --------
    >>> balance = ml.stats.load_balance(trace)
    >>> ml.show.by_layer(balance.sel(measure="cv")).get_xlabel()
    'layer'
    """
    series = list(wording.groups(data, "layer"))
    units = {wording.unit(part) for _, part in series}
    if "layer" not in data.dims or len(series) > 16 or len(units) > 1:
        raise BadInput(
            f"Cannot draw {wording.title(data)} by layer: the data has dimensions "
            f"{dict(data['estimate'].sizes)} and units {' and '.join(sorted(units))}. "
            "Select with data.sel(...) until the layers of at most 16 lines in one unit remain.",
            argument="data",
            value=dict(data["estimate"].sizes),
        )
    with drawing(ax, *_size(len(series))) as ax:
        _lines(ax, series)
        _layer_axis(ax, data)
        value_axis(ax, data)
        uniform_lines(ax, data, series)
        _name_lines(ax, series)
        heading(ax, title or named(data), wording.note(data, drawn="whiskers"))
    return ax


def _lines(ax: Axes, series: list[tuple[str, xr.Dataset]]) -> None:
    colours = series_colours(len(series))
    step = 0.5 / max(len(series), 8)  # so that whiskers of neighbouring lines do not overlap
    width, thin = (0.7, 0.4) if len(series) > _FEW else (1.1, 1.0)
    for i, (name, part) in enumerate(series):
        at = part["layer"].to_numpy() + (i - (len(series) - 1) / 2) * step
        ax.plot(at, part["estimate"], color=colours[i], linewidth=width)
        marker = MARKERS[i % len(MARKERS)]
        size = 2 if len(series) > _FEW else None
        ax.plot(at, part["estimate"], color=colours[i], marker=marker, ms=size, linestyle="", label=in_legend(name))
        ax.vlines(at, part["ci_low"], part["ci_high"], color=colours[i], linewidth=thin)
        if "expected" in part:
            ax.plot(at, part["expected"], color=colours[i], linestyle=":", linewidth=1)
            ax.fill_between(at, part["null_low"], part["null_high"], color=colours[i], alpha=0.15, linewidth=0)


@takes("stats.routing_entropy", "estimate", "layer")
def routing_entropy(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the mean routing entropy by layer, with its interval as a band.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.routing_entropy`, ``[*by, layer]``. With groups, draws one line per group as `by_layer` does.
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
    >>> ml.show.routing_entropy(ml.stats.routing_entropy(trace)).get_xlabel()
    'layer'
    """
    series = list(wording.groups(data, "layer"))
    if len(series) > 1:
        return by_layer(data, ax, title=title)
    with drawing(ax) as ax:
        part = series[0][1]
        ax.fill_between(part["layer"], part["ci_low"], part["ci_high"], color=SERIES_COLOURS[0], alpha=0.3, lw=0)
        ax.plot(part["layer"], part["estimate"], color=SERIES_COLOURS[0], marker="o")
        _layer_axis(ax, data)
        value_axis(ax, data)
        uniform_lines(ax, data)
        ax.set_ylim(bottom=0)
        heading(ax, title or named(data), wording.note(data, drawn="band"))
    return ax


@takes("stats.repetition", "estimate", "layer", "choice")
def repetition(
    data: xr.Dataset,
    ax: Axes | None = None,
    *,
    choice: str = "first",
    published: xr.Dataset | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the share of consecutive tokens whose choice repeats, by layer (Jiang et al. 2024, Table 5).

    Up to eight groups are lines; more are the rows of a map.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.repetition`, ``[*by, layer, choice]``.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    choice : {"first", "either"}, optional
        Whether the first choice repeats, or either the first or the second one.
    published : xarray.Dataset, optional
        `stats.table5()`: another model's numbers, drawn at the same relative depth; in the note of a map.
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
    >>> repetition = ml.stats.repetition(trace)
    >>> ax = ml.show.repetition(repetition, choice="either", published=ml.stats.table5())
    >>> ax.get_xlabel()
    'layer'
    """
    data = data.sel(choice=choice)
    published = None if published is None else published.sel(choice=choice)
    shown = [(name or "this trace", part) for name, part in wording.groups(data, "layer")]
    if len(shown) > _MOST_LINES:
        return _repetition_map(data, shown, ax, published, title)
    width, height = _size(len(shown) + (published is not None))
    with drawing(ax, width, height if published is None else height + 0.4) as ax:  # the note is longer
        _lines(ax, shown)
        note = wording.note(data, drawn="whiskers")
        if published is not None:
            note += "; " + _published_points(ax, published, data["layer"].to_numpy())
        _layer_axis(ax, data)
        value_axis(ax, data)
        uniform_lines(ax, data)
        _name_lines(ax, shown)
        heading(ax, title or message(data), note)
    return ax


def _repetition_map(
    data: xr.Dataset,
    rows: list[tuple[str, xr.Dataset]],
    ax: Axes | None,
    published: xr.Dataset | None,
    title: str | None,
) -> Axes:
    """Draw one row per group, for more groups than lines can show."""
    groups = [name for name in data["estimate"].dims if name != "layer"]
    row = str(groups[0]) if len(groups) == 1 else "group"
    named = xr.concat([part.drop_vars(groups) for _, part in rows], row).assign_coords(
        {row: [name for name, _ in rows]}
    )
    also = ""
    if published is not None:
        spans = (
            f"{100 * of.min():.0f} to {100 * of.max():.0f} %" for of in published["estimate"].transpose("layer", ...)
        )
        also = f"Mixtral-8x7B in layers 0, 15 and 31: {', '.join(spans)} (Jiang et al. 2024, Table 5)"
    with drawing(ax, PAGE, 1.1 + map_height(len(rows))) as ax:
        matrix(ax, named, row, "layer", title=title, also=also)
        ax.set_ylabel("")
    return ax


def _published_points(ax: Axes, published: xr.Dataset, layers: np.ndarray) -> str:
    """Draw a hollow diamond for each published domain, and return the note that names their source."""
    depth = published["layer"].to_numpy() / 31  # Table 5 has layers 0, 15 and 31 of 32
    at = layers[0] + depth * (layers[-1] - layers[0])
    values = published["estimate"].transpose("domain", "layer").to_numpy()
    for i, row in enumerate(values):
        style = {"marker": "D", "markersize": 3.5, "markerfacecolor": "none", "markeredgewidth": 0.7, "linestyle": ""}
        ax.plot(at, row, color=MUTED, zorder=1, label="Mixtral-8x7B, published" if i == 0 else "_", **style)
    return (
        f"diamonds: another model, Mixtral-8x7B, {len(values)} domains of the Pile, layers 0, 15, 31 at the same "
        "relative depth, without n or intervals (Jiang et al. 2024, Table 5)"
    )


@takes("stats.domain_information", "estimate", "layer", "measure")
def domain_information(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the mutual information between expert and domain by layer, beside that of permuted domain labels.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.domain_information`, [layer, measure].
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
    >>> information = ml.stats.domain_information(trace, by="domain")
    >>> ml.show.domain_information(information).get_xlabel()
    'layer'
    """
    with drawing(ax, *_size(2)) as ax:
        _lines(ax, list(wording.groups(data.sel(measure=["mutual_information", "permuted"]), "layer")))
        _layer_axis(ax, data)
        value_axis(ax, data)
        ax.set_ylim(bottom=0)
        legend(ax)
        note = f"{wording.sample(data)}; {wording.over(data, 'whiskers')}"
        heading(ax, title or message(data), note + "; chance: domain labels permuted over documents")
    return ax


def uniform_lines(ax: Axes, data: xr.Dataset, series: Sequence[tuple[str, xr.Dataset]] = ()) -> None:
    """Draw dashed lines at the uniform levels.

    Where the lines of `series` have different levels, each level has the colour of its line.
    """
    style = {"linestyle": (0, (4, 3)), "linewidth": 0.8, "zorder": 2.5}
    value = wording.uniform(data)
    levels = [] if value is None else np.unique(value.to_numpy()[np.isfinite(value)])
    if len(levels) == 1:
        ax.axhline(float(levels[0]), color=INK, **style)
        return
    for (_, part), colour in zip(series, series_colours(len(series)), strict=True):
        if (own := wording.uniform(part)) is not None:
            ax.axhline(float(own), color=colour, **style)


def value_axis(ax: Axes, data: xr.Dataset) -> None:
    if wording.is_fraction(data):
        ax.yaxis.set_major_formatter(percent)
        of = wording.denominator(data)
        ax.set_ylabel(f"share {of}" if of else "", fontsize=relative_size(0.9))
    else:
        ax.set_ylabel(wording.unit(data))


def _layer_axis(ax: Axes, data: xr.Dataset) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    layers = data["layer"].to_numpy()
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    ax.set_xlabel("layer")


def _name_lines(ax: Axes, series: Sequence[tuple[str, xr.Dataset]]) -> None:
    """Label the lines in a legend if they are few, else at their ends without overlap."""
    if len(ax.get_legend_handles_labels()[1]) <= _FEW:
        if len(ax.get_legend_handles_labels()[1]) > 1:
            legend(ax)
        return
    ends = [(float(part["estimate"].to_numpy()[-1]), name, colour)
            for (name, part), colour in zip(series, series_colours(len(series)), strict=True)]  # fmt: skip
    ends = sorted((end for end in ends if np.isfinite(end[0])), key=lambda end: end[0])
    low, high = ax.get_ylim()
    apart = (high - low) * 1.25 * SMALLEST / cell_size(ax, 1, 1)[1]
    places = _spread([end for end, _, _ in ends], apart, low)
    last = float(series[0][1]["layer"].to_numpy()[-1])
    right = ax.get_xlim()[1]
    across = (right - ax.get_xlim()[0]) * 0.04
    for (end, name, colour), place in zip(ends, places, strict=True):
        ax.plot([last + 0.3, right + across], [end, place], color=colour, linewidth=0.7, clip_on=False)
        beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        ax.annotate(printable(name), (right + across, place), fontsize=SMALLEST, **beside)
    ax.set_xlim(right=right)
    ax.set_ylim(low, high)


def _spread(wanted: list[float], apart: float, low: float) -> list[float]:
    """Return ascending positions at least `apart` from each other, near the `wanted` ones."""
    places: list[float] = []
    for want in wanted:
        places.append(max(want, places[-1] + apart if places else low))
    over = sum(place - want for place, want in zip(places, wanted, strict=True)) / max(len(places), 1)
    return [max(place - over, low + i * apart) for i, place in enumerate(places)]


def legend(ax: Axes) -> None:
    """Place the legend below the axes, so that it covers nothing, or beside them when it has many entries."""
    if len(ax.get_legend_handles_labels()[1]) <= _FEW:
        return legend_below(ax, columns=1)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=SMALLEST)


def _size(n_series: int) -> tuple[float, float]:
    """Return the size of a line figure in inches, with room for its legend."""
    return (COLUMN, 2.4 + 0.16 * (n_series if n_series > 1 else 0)) if n_series <= _FEW else (PAGE * 0.8, 2.6)
