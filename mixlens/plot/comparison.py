"""Figures of two runs over the same tokens: routing flips and sources of a quality loss."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from mixlens.errors import BadInput
from mixlens.plot import labels
from mixlens.plot.checks import takes, takes_run
from mixlens.plot.colours import series_colours
from mixlens.plot.heatmap import cells, colour_bar, layers_by_experts, map_height, map_width, numbers
from mixlens.plot.lines import by_layer
from mixlens.plot.messages import named
from mixlens.plot.style import (
    COLUMN,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    PAGE,
    drawing,
    heading,
    in_legend,
    legend_below,
    percent,
    relative_size,
)
from mixlens.stats.pareto import Pareto

_ORDERS = {"weights_first": "routing last", "routing_first": "routing first", "mean": "mean of both"}
_QUANTITIES = {
    "loss": "change in loss, nats per token",
    "kl": "KL divergence, nats per token",
    "other_top": "tokens with another top prediction",
}
_AXES = {
    "bytes": (1e-6, "weights, MB"),
    "expert_bits": (1.0, "bits an expert weight"),
    "kl": (1.0, "KL divergence, nats per token"),
    "loss_difference": (1.0, "change in loss, nats per token"),
    "same_top": (1.0, "same top token, share"),
    "ttft_s": (1e3, "time to first token, ms"),
    "tpot_s": (1e3, "time per output token, ms"),
}
_PARTS = {"weights": "from other weights", "everything else": "from everything else", "routing": "from other routing"}


@takes("stats.flips", "estimate", "layer", "measure")
def flips_by_layer(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the share of tokens that choose other experts, by layer.

    There are three lines: in this layer, for the first time in this layer, and in this layer or an earlier one.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.flips`, [layer, measure].
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
    >>> compared = ml.compare(trace, trace)
    >>> ml.show.flips_by_layer(compared.flips()).get_xlabel()
    'layer'
    """
    part = labels.only(data.sel(measure=["changed", "first_flip", "so_far"]), "flips_by_layer", "layer", "measure")
    ax = by_layer(part, ax, title=title)
    ax.set_ylim(bottom=0)
    return ax


@takes("stats.flips_by_margin", "estimate", "margin", "margin_from")
def flips_by_margin(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the share of choices that flip against the router's margin in the first run.

    Grey bars show how the choices are distributed over the margins.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.flips_by_margin`, [margin], or with one other dimension, such as domain.
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
        If `data` is not such a Dataset, or has more than a dozen lines.

    Examples
    --------
    >>> compared = ml.compare(trace, trace)
    >>> ml.show.flips_by_margin(compared.flips_by_margin()).get_xlabel()
    'margin to the best expert left out, logits'
    """
    series = list(labels.groups(data, "margin"))
    if len(series) > len(MARKERS):
        raise BadInput(
            f"Cannot draw flips by margin: the data has {len(series)} lines. Select at most {len(MARKERS)}.",
            argument="data",
            value=len(series),
        )
    edges = [f"{low:g}–{high:g}" for low, high in zip(data["margin_from"].values, data["margin"].values, strict=True)]
    edges = ["<" + edges[0].split("–")[1], *edges[1:-1], ">" + edges[-1].split("–")[0]]
    with drawing(ax, COLUMN, 2.5 + (0.16 * len(series) if len(series) > 1 else 0)) as ax:
        at = np.arange(len(edges))
        share = data["n"].sum([d for d in data["n"].dims if d != "margin"]).to_numpy() / float(data["n"].sum())
        ax.bar(at, share, width=0.9, color=FAINT, edgecolor=MUTED, linewidth=0.6, label="choices in the bin")
        step = 0.5 / max(len(series), 8)
        for i, ((name, part), colour) in enumerate(zip(series, series_colours(len(series)), strict=True)):
            place = at + (i - (len(series) - 1) / 2) * step
            ax.plot(place, part["estimate"], color=colour, marker=MARKERS[i], label=in_legend(name) or "that flip")
            ax.vlines(place, part["ci_low"], part["ci_high"], color=colour, linewidth=1)
        ax.set_xticks(at, edges, rotation=40, ha="right", rotation_mode="anchor", fontsize=relative_size(0.75))
        ax.yaxis.set_major_formatter(percent)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("margin to the best expert left out, logits")
        legend_below(ax, also=16)
        n = f"n = {int(data['n'].sum()):,} choices, {labels.span(data['n_documents'])} documents"
        heading(
            ax,
            title or labels.title(data),
            f"{n}; {labels.over(data, 'whiskers')}; grey: all choices",
        )
    return ax


@takes("experiments.measure_impact(...).split()", "estimate", "quantity", "order", "part")
def quality_split(
    data: xr.Dataset, ax: Axes | None = None, *, quantity: str = "loss", title: str | None = None
) -> Axes:
    """Draw how much of the change comes from other routing and from everything else, in both orders and on average.

    Parameters
    ----------
    data : xarray.Dataset
        From `Impact.split`, [quantity, order, part].
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    quantity : {"loss", "kl", "other_top"}, optional
        The quantity whose change is drawn.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset or still has domains to select from, or `quantity` is unknown.

    Examples
    --------
    >>> short = ml.RecordSettings(max_length=8, overlong="truncate", progress=False)

    >>> impact = ml.experiments.measure_impact(model, model, documents[:1], settings=short)
    >>> ml.show.quality_split(impact.split(), quantity="kl").get_xlabel()
    'KL divergence, nats per token'
    """
    if quantity not in _QUANTITIES:
        raise BadInput(
            f"Cannot draw the split of {quantity!r}. Pass quantity= one of {', '.join(_QUANTITIES)}.",
            argument="quantity",
            value=quantity,
        )
    part = labels.only(data.sel(quantity=quantity, drop=True), "quality_split", "order", "part")
    with drawing(ax, COLUMN, 2.2) as ax:
        rows = np.arange(len(_ORDERS))[::-1]
        parts = [str(name) for name in part["part"].to_numpy() if name in _PARTS]
        colours = dict(zip(parts, series_colours(2), strict=True))
        for i, name in enumerate(parts):
            cell = part.sel(part=name, order=list(_ORDERS))
            at = rows + (0.5 - i) * 0.3
            ax.barh(at, cell["estimate"], height=0.28, color=colours[name], linewidth=0, label=_PARTS[name])
            ax.hlines(at, cell["ci_low"], cell["ci_high"], color=INK, linewidth=0.8, zorder=3)
        whole, cast = (float(part.sel(order="mean", part=name)["estimate"]) for name in ("total", "arithmetic"))
        ax.axvline(whole, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="in all")
        if np.isfinite(cast) and "weights" not in parts:
            ax.axvline(cast, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), label="arithmetic alone")
        ax.axvline(0, color=INK, linewidth=0.6)
        ax.set_yticks(rows, list(_ORDERS.values()))
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(_QUANTITIES[quantity])
        if quantity == "other_top":
            ax.xaxis.set_major_formatter(percent)
        legend_below(ax)
        note = f"{labels.sample(data)}; {labels.over(data, 'whiskers')}, paired"
        heading(ax, title or named(part), note)
    return ax


@takes("experiments.measure_impact(...).experts()", "estimate", "layer", "expert")
def expert_errors(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the relative error of every expert's output, given the input that it had in the first model.

    Parameters
    ----------
    data : xarray.Dataset
        From `Impact.experts`, [layer, expert].
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

    >>> impact = ml.experiments.measure_impact(model, model, documents[:1], settings=short)
    >>> ax = ml.show.expert_errors(impact.experts())
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('expert', 'layer')
    """
    part = labels.only(data, "expert_errors", "layer", "expert").transpose("layer", "expert", ...)
    with drawing(ax, map_width(data.sizes["expert"]), 1.2 + map_height(data.sizes["layer"])) as ax:
        values = part["estimate"].to_numpy()
        most = float(values[np.isfinite(values)].max(initial=0)) or 1.0
        drawn = cells(ax, values, "Reds", Normalize(0, most))
        colour_bar(drawn, [ax], "relative error", percent)
        numbers(ax, drawn, np.vectorize(lambda v: f"{100 * v:.0f}" if np.isfinite(v) else "")(values))
        layers_by_experts(ax, part)
        chose = f"n = {labels.span(data['n'])} tokens an expert"
        note = f"per cent; ‖f_b(x) − f_a(x)‖ / ‖f_a(x)‖; {chose}; grey: chosen by none"
        heading(ax, title or named(part), note)
    return ax


@takes_run("pareto", "of", "front")
def pareto(data: Pareto, ax: Axes | None = None, *, x: str = "bytes", y: str = "kl", title: str | None = None) -> Axes:
    """Draw the schemes of one model in two measured quantities, such as the quality lost against the bytes spent.

    The dashed line joins the schemes that no other scheme beats in both quantities.

    Parameters
    ----------
    data : Pareto
        From `experiments.measure_pareto`.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    x, y : str, optional
        Quantities of its table, such as bytes, tpot_s or ttft_s against kl, perplexity or same_top.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is no such run, or a quantity was not measured.

    Examples
    --------
    >>> measured = ml.open("runs/schemes")  # doctest: +SKIP
    >>> ml.show.pareto(measured, x="bytes", y="kl").get_xlabel()  # doctest: +SKIP
    'weights, MB'
    """
    (factor, label), (factor_y, label_y) = axis_of(x), axis_of(y)
    across, up = _scaled(data, x, factor), _scaled(data, y, factor_y)
    schemes = [scheme for scheme in data.schemes if scheme in across and scheme in up]
    with drawing(ax, PAGE * 0.62, 2.9) as ax:
        front = data.front(x, y)
        line = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}
        ax.plot([across[scheme][0] for scheme in front], [up[scheme][0] for scheme in front], **line)
        for i, (scheme, colour) in enumerate(zip(schemes, series_colours(len(schemes)), strict=True)):
            (at, left, right), (height, low, high) = across[scheme], up[scheme]
            style = {"marker": MARKERS[i % len(MARKERS)], "linestyle": "", "clip_on": False, "zorder": 3}
            ax.plot(at, height, color=colour, label=in_legend(scheme), **style)
            ax.hlines(height, left, right, color=colour, linewidth=1)
            ax.vlines(at, low, high, color=colour, linewidth=1)
        positive = [height for height, _, _ in up.values() if height > 0]
        if y == "kl" and positive:  # values span orders of magnitude, and the original is at zero
            ax.set_yscale("symlog", linthresh=min(positive))
            ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        ax.set_xlabel(label)
        ax.set_ylabel(label_y)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        tokens, documents = int(data.of("kl")["n"].max()), data.meta["documents"]
        note = f"n = {tokens:,} tokens, {documents:,} documents; whiskers: 95 % interval; dashed: not beaten in both"
        heading(ax, title or f"{label_y.split(',')[0]} against {label.split(',')[0]}", note)
    return ax


def axis_of(quantity: str) -> tuple[float, str]:
    """Return the factor that scales a quantity of a Pareto for display, and its axis label."""
    return _AXES.get(quantity, (1.0, quantity.replace("_", " ")))


def _scaled(data: Pareto, quantity: str, factor: float) -> dict[str, list[float]]:
    """Return [estimate, ci_low, ci_high] by scheme, scaled for display."""
    rows = data.of(quantity)[["estimate", "ci_low", "ci_high"]].astype(float) * factor
    return {str(scheme): values for scheme, values in zip(rows.index, rows.to_numpy().tolist(), strict=True)}
