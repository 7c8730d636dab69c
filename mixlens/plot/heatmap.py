"""Heat maps whose few largest values would hide all others: colours linear near zero, logarithmic beyond."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, LogNorm, Normalize, SymLogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mixlens.errors import BadInput
from mixlens.plot import labels
from mixlens.plot.style import DIVERGING, FAINT, INK, printable

_SPREAD = 8  # times the median at which a linear scale shows only the largest


def turning_point(values: np.ndarray) -> float | None:
    """Return where a signed scale goes from linear to logarithmic, or None if a linear scale shows all values.

    This is the median of the magnitudes, rounded down to one digit, if the largest is at least 8 times the median.
    """
    sizes = np.abs(values[np.isfinite(values)])
    median = float(np.median(sizes)) if sizes.size else 0.0
    if median == 0 or sizes.max() < _SPREAD * median:
        return None
    digit = 10.0 ** math.floor(math.log10(median))
    return math.floor(median / digit) * digit


def scale_note(values: np.ndarray) -> str:
    """Describe the scale of signed values for the note of a figure; empty if it is linear."""
    turn = turning_point(values)
    return "" if turn is None else f"scale linear to ±{turn:g}, logarithmic beyond"


def signed_ticks(turn: float, limit: float) -> list[float]:
    """Return the ticks of a scale that is linear to `turn`: zero, the turn, and the powers of ten well beyond it."""
    powers = range(math.ceil(math.log10(turn)), math.floor(math.log10(limit)) + 1)
    ticks = [turn, *(10.0**power for power in powers if 10.0**power > 4 * turn)]
    return [*(-tick for tick in reversed(ticks)), 0.0, *ticks]


def signed_axis(ax: Axes, values: np.ndarray) -> None:
    """Put the y axis on the scale of `mesh` if a linear one would hide most values."""
    if (turn := turning_point(values)) is not None:
        ax.set_yscale("symlog", linthresh=turn)
        ax.yaxis.set_major_locator(FixedLocator(signed_ticks(turn, float(np.nanmax(np.abs(values))))))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())


def mesh(ax: Axes, values: np.ndarray, label: str, *, signed: bool = True) -> None:
    """Draw values [row, column] with a colour bar, missing values in grey.

    Signed values are blue below zero and red above it. Others run from white at the smallest to red, on a logarithmic
    scale if the largest is far from the rest.
    """
    ax.set_facecolor(FAINT)
    norm, ticks = _signed(values) if signed else _positive(values)
    cells = ax.pcolormesh(
        np.ma.masked_invalid(values), cmap=DIVERGING if signed else "Reds", norm=norm, edgecolors="white", linewidth=0.3
    )
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(cells, ax=ax, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if ticks is not None:
        bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(labelsize=6, length=2, width=0.5)
    bar.set_label(label, fontsize=7)


def group_of(data: xr.Dataset) -> str:
    """Return the dimension other than layer and expert; raise BadInput if there is none."""
    groups = [str(d) for d in data["estimate"].dims if d not in ("layer", "expert")]
    if not groups:
        raise BadInput(
            "Cannot draw a row for every domain: the numbers cover all documents together. Compute them with "
            'by="domain", or use the figure without domains.',
            argument="by",
        )
    return groups[0]


def by_group(ax: Axes, data: xr.Dataset, what: str, label: str, *, signed: bool = True) -> None:
    """Draw one row per group and one column per expert, layers side by side.

    Dots mark signed numbers that survive. Raises BadInput if `data` has further dimensions.
    """
    group = group_of(data)
    data = labels.only(data, what, group, "layer", "expert").transpose(group, "layer", "expert")
    rows, layers, experts = (data.sizes[dim] for dim in (group, "layer", "expert"))
    mesh(ax, data["estimate"].to_numpy().reshape(rows, -1), label, signed=signed)
    if signed:
        dots(ax, labels.surviving(data).reshape(rows, -1))
    for edge in range(1, layers):
        ax.axvline(edge * experts, color=INK, linewidth=0.5)
    ax.set_yticks(np.arange(rows) + 0.5, [printable(name) for name in data[group].to_numpy()])
    step = -(-layers // 16)
    ax.set_xticks((np.arange(0, layers, step) + 0.5) * experts, map(str, data["layer"].to_numpy()[::step]))
    ax.set_xlabel(f"layer (in each, experts {data['expert'].to_numpy()[0]} to {data['expert'].to_numpy()[-1]})")


def numbered(ax: Axes, layers: np.ndarray) -> None:
    """Label the rows with layer numbers, skipping some if there are many."""
    step = -(-len(layers) // 24)
    ax.set_yticks(np.arange(0, len(layers), step) + 0.5, map(str, layers[::step]))
    ax.set_ylabel("layer")


def dots(ax: Axes, survives: np.ndarray) -> None:
    """Draw a dot in the cells [row, column] that are true."""
    row, column = np.nonzero(survives)
    ax.plot(column + 0.5, row + 0.5, marker=".", markersize=2, linestyle="", color=INK)


def _signed(values: np.ndarray) -> tuple[Normalize, list[float] | None]:
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    turn = turning_point(values)
    if turn is None:
        return CenteredNorm(0, limit), None
    return SymLogNorm(turn, vmin=-limit, vmax=limit, base=10), signed_ticks(turn, limit)


def _positive(values: np.ndarray) -> tuple[Normalize, list[float] | None]:
    finite = values[np.isfinite(values) & (values > 0)]
    if not finite.size or turning_point(values) is None:
        return Normalize(0, float(finite.max()) if finite.size else 1.0), None
    low, high = float(finite.min()), float(finite.max())
    decades = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return LogNorm(low, high), decades
