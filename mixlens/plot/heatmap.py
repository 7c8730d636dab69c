"""Cells, numbers, axes and colour scales of heat maps.

If a few large values would hide all others, the scale is linear near zero and logarithmic beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import CenteredNorm, LogNorm, Normalize, SymLogNorm, to_hex
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mixlens.errors import BadInput
from mixlens.plot import labels
from mixlens.plot.colours import ink_on
from mixlens.plot.style import COLUMN, DIVERGING, FAINT, INK, PAGE, SMALLEST, printable

_MOST_VECTORS = 1500  # cells; a larger map is a picture within the figure, and cells have no gaps
_CHARACTER = 0.62  # width of a digit in sizes
_MANY = 32  # experts, beyond which a map takes the width of the page
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


def map_width(columns: int) -> float:
    """Return the width in inches of a map with this number of columns."""
    return COLUMN if columns <= _MANY else PAGE


def map_height(rows: int) -> float:
    """Return the height in inches of a map with this number of rows, without its heading."""
    return 0.16 * max(rows, 8) if rows <= _MANY else 0.16 * _MANY + 0.06 * (rows - _MANY)


def cells(ax: Axes, values: np.ndarray, colours: str, norm: Normalize) -> QuadMesh:
    """Draw values [row, column], the first row on top, missing values in grey."""
    many = values.size > _MOST_VECTORS
    gaps: dict[str, Any] = {"rasterized": True} if many else {"edgecolors": "white", "linewidth": 0.4}
    ax.set_facecolor(FAINT)
    drawn = ax.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, **gaps)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return drawn


def numbers(ax: Axes, drawn: QuadMesh, shown: np.ndarray, bold: np.ndarray | None = None) -> bool:
    """Write texts [row, column] into the cells, and return whether they fit and were written."""
    width, height = cell_size(ax, *shown.shape)
    longest = max(map(len, shown.ravel()), default=0)
    if longest * _CHARACTER * SMALLEST > width or SMALLEST > 0.9 * height:
        return False
    values = drawn.get_array()
    assert values is not None
    fills = np.asarray(drawn.cmap(drawn.norm(np.ma.masked_invalid(values).reshape(shown.shape))))
    missing = np.ma.getmaskarray(np.ma.masked_invalid(values)).reshape(shown.shape)
    for (i, j), text in np.ndenumerate(shown):
        ax.text(
            j + 0.5,
            i + 0.5,
            text,
            ha="center",
            va="center_baseline",
            fontsize=SMALLEST,
            color=ink_on(FAINT if missing[i, j] else to_hex(tuple(fills[i, j]))),
            fontweight="bold" if bold is not None and bold[i, j] else "normal",
            in_layout=False,
        )
    return True


def cell_size(ax: Axes, rows: int, columns: int) -> tuple[float, float]:
    """Estimate the width and height of a cell in points, before the layout is known."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    box, (width, height) = ax.get_position(), figure.get_size_inches() * 72 * 0.8
    return box.width * width / columns, box.height * height / rows


def column_ticks(ax: Axes, names: Sequence[object] | np.ndarray) -> None:
    """Label the columns, skipping some where the labels would touch."""
    longest = max((len(str(name)) for name in names), default=1)
    room = cell_size(ax, 1, 1)[0] / ((longest + 1.5) * _CHARACTER * SMALLEST)
    step = -(-len(names) // max(1, int(room)))
    ax.set_xticks(np.arange(0, len(names), step) + 0.5, [printable(name) for name in names[::step]])


def row_ticks(ax: Axes, names: Sequence[object] | np.ndarray) -> None:
    """Label the rows, skipping some where the labels would touch."""
    step = -(-len(names) // max(1, int(cell_size(ax, 1, 1)[1] / (1.3 * SMALLEST))))
    ax.set_yticks(np.arange(0, len(names), step) + 0.5, [printable(name) for name in names[::step]])


def colour_bar(
    drawn: ScalarMappable,
    beside: Sequence[Axes],
    label: str,
    shown: Callable[[float, int | None], str] | None = None,
    ticks: Sequence[float] | None = None,
) -> Axes:
    """Draw the scale of `drawn` to the right of the axes, with only the given `ticks`, formatted by `shown`."""
    figure = beside[0].get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(drawn, ax=list(beside), fraction=0.06, pad=0.02, aspect=25)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if ticks is not None:
        bar.ax.yaxis.set_major_locator(FixedLocator(list(ticks)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    if shown is not None or ticks is not None:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(shown or (lambda value, _: f"{value:g}")))
    bar.ax.tick_params(labelsize=SMALLEST, length=2, width=0.5)
    bar.set_label(printable(label), fontsize=SMALLEST)
    return bar.ax


def mesh(ax: Axes, values: np.ndarray, label: str, *, signed: bool = True, bold: np.ndarray | None = None) -> str:
    """Draw values [row, column] with a colour bar and, where they fit, numbers; return a note on their unit.

    Signed values are blue below zero and red above it. Others run from white at the smallest to red, on a logarithmic
    scale if the largest is far from the rest.
    """
    norm, ticks = _signed(values) if signed else _positive(values)
    drawn = cells(ax, values, DIVERGING if signed else "Reds", norm)
    colour_bar(drawn, [ax], label, ticks=ticks)
    largest = np.abs(values[np.isfinite(values)]).max(initial=0)
    digit = 10.0 ** (math.floor(math.log10(largest)) - 1) if largest else 1.0
    shown = np.vectorize(lambda value: f"{value / digit:.0f}".replace("-", "−") if np.isfinite(value) else "")(values)
    shown[shown == "−0"] = "0"
    return f"numbers: in {digit:g}" if shown.size and numbers(ax, drawn, shown, bold) else ""


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


def by_group(ax: Axes, data: xr.Dataset, what: str, label: str, *, signed: bool = True) -> str:
    """Draw one row per group and one column per expert, layers side by side.

    Returns a note on the unit of the numbers in the cells, where they fit; else dots mark signed numbers that survive.
    Raises BadInput if `data` has further dimensions.
    """
    group = group_of(data)
    data = labels.only(data, what, group, "layer", "expert").transpose(group, "layer", "expert")
    rows, layers, experts = (data.sizes[dim] for dim in (group, "layer", "expert"))
    survives = labels.surviving(data).reshape(rows, -1)
    unit = mesh(ax, data["estimate"].to_numpy().reshape(rows, -1), label, signed=signed, bold=survives)
    if signed and not unit:
        dots(ax, survives)
    for edge in range(1, layers):
        ax.axvline(edge * experts, color=INK, linewidth=0.5)
    row_ticks(ax, data[group].to_numpy())
    step = -(-layers // 16)
    ax.set_xticks((np.arange(0, layers, step) + 0.5) * experts, map(str, data["layer"].to_numpy()[::step]))
    ax.set_xlabel(f"layer (in each, experts {data['expert'].to_numpy()[0]} to {data['expert'].to_numpy()[-1]})")
    return unit


def layers_by_experts(ax: Axes, data: xr.Dataset) -> None:
    """Label the rows of a map with layer numbers and its columns with experts."""
    row_ticks(ax, data["layer"].to_numpy())
    column_ticks(ax, data["expert"].to_numpy())
    ax.set_ylabel("layer")
    ax.set_xlabel("expert")


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
