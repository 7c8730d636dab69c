"""Bars and lines: expert share by domain, and statistics that change from layer to layer.

Every function takes a statistic's Dataset and `ax`, draws on it or on new Axes in paper style, and returns the Axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mixlens.errors import BadInput
from mixlens.plot import labels as wording
from mixlens.plot.checks import takes
from mixlens.plot.colours import SERIES_COLOURS, expert_colours, series_colours
from mixlens.plot.heatmap import cell_size
from mixlens.plot.messages import message, named
from mixlens.plot.style import (
    COLUMN,
    INK,
    MARKERS,
    MUTED,
    PAGE,
    SMALLEST,
    add_axes,
    drawing,
    drop_note,
    heading,
    in_legend,
    legend_below,
    paper,
    paper_figure,
    percent,
    printable,
    relative_size,
)

_FEW = 4  # lines whose legend fits below the axes; more are named at their ends
_MOST_EXPERTS = 16  # in a figure of bars


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
            _legend(ax)
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
    """Return the experts that a figure of bars has room for, and a note on the others."""
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
        _bars(ax, at, estimate, (low, high), width=width, color=colours[i], label=in_legend(name))
    ax.set_xticks(range(len(clusters)), [printable(c) for c in clusters])
    if x == "domain" and len(clusters) > 6:
        ax.tick_params(axis="x", rotation=30)
    ax.set_xlabel("expert" if x == "expert" else "")
    ax.set_xlim(-0.6, len(clusters) - 0.4)
    ax.tick_params(axis="x", length=0)
    _value_axis(ax, data)
    _uniform_lines(ax, data)


def _bars(
    ax: Axes, at: np.ndarray, estimate: np.ndarray, interval: tuple[np.ndarray, np.ndarray], **style
) -> BarContainer:
    bars = ax.bar(at, estimate, linewidth=0, **style)
    ax.vlines(at, *interval, color=INK, linewidth=0.6, zorder=3)
    return bars


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
        _value_axis(ax, data)
        _uniform_lines(ax, data, series)
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
        _value_axis(ax, data)
        _uniform_lines(ax, data)
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

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.repetition`, ``[*by, layer, choice]``.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    choice : {"first", "either"}, optional
        Whether the first choice repeats, or either the first or the second one.
    published : xarray.Dataset, optional
        `stats.table5()`: another model's numbers, drawn at the same relative depth.
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
    shown = [(name or "this trace", part) for name, part in wording.groups(data, "layer")]
    width, height = _size(len(shown) + (published is not None))
    with drawing(ax, width, height if published is None else height + 0.4) as ax:  # the note is longer
        _lines(ax, shown)
        note = wording.note(data, drawn="whiskers")
        if published is not None:
            note += "; " + _published_points(ax, published.sel(choice=choice), data["layer"].to_numpy())
        _layer_axis(ax, data)
        _value_axis(ax, data)
        _uniform_lines(ax, data)
        _name_lines(ax, shown)
        heading(ax, title or message(data), note)
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
        _value_axis(ax, data)
        ax.set_ylim(bottom=0)
        _legend(ax)
        note = f"{wording.sample(data)}; {wording.over(data, 'whiskers')}"
        heading(ax, title or message(data), note + "; chance: domain labels permuted over documents")
    return ax


def _uniform_lines(ax: Axes, data: xr.Dataset, series: Sequence[tuple[str, xr.Dataset]] = ()) -> None:
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


def _value_axis(ax: Axes, data: xr.Dataset) -> None:
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
    """Name several lines: in a legend if they are few, else at their ends, as far apart as their names are high."""
    if len(ax.get_legend_handles_labels()[1]) <= _FEW:
        if len(ax.get_legend_handles_labels()[1]) > 1:
            _legend(ax)
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
    """Return ascending places at least `apart` from each other, as near to those `wanted` as one pass each way gets."""
    places: list[float] = []
    for want in wanted:
        places.append(max(want, places[-1] + apart if places else low))
    over = sum(place - want for place, want in zip(places, wanted, strict=True)) / max(len(places), 1)
    return [max(place - over, low + i * apart) for i, place in enumerate(places)]


def _legend(ax: Axes) -> None:
    """Place the legend below the axes, so that it covers nothing, or beside them when it has many entries."""
    if len(ax.get_legend_handles_labels()[1]) <= _FEW:
        return legend_below(ax, columns=1)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=SMALLEST)


def _size(n_series: int) -> tuple[float, float]:
    """Return the size of a line figure in inches, with room for its legend."""
    return (COLUMN, 2.4 + 0.16 * (n_series if n_series > 1 else 0)) if n_series <= _FEW else (PAGE * 0.8, 2.6)
