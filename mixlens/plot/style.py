"""Style of figures: type sizes for papers, and Axes created without pyplot."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, ScaledTranslation, blended_transform_factory

from mixlens.core.files import write_file
from mixlens.plot.dark import with_dark

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
INK, MUTED, FAINT = "#1b1b1f", "#5c5c66", "#d6d6dc"
DIVERGING = "RdBu_r"
_STAND_INS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Emoji", "Symbola")
COLUMN, PAGE = 3.3, 7.0  # inches: one column, and the whole width, of a two-column paper
SMALLEST = 7.0  # points, of any text

PAPER: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "figure.facecolor": "white",  # also where the notebook's own style is dark: ink is dark
    "savefig.facecolor": "white",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "figure.dpi": 110,
    "savefig.dpi": 220,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "text.hinting": "none",  # widths that do not depend on the resolution
    "svg.hashsalt": "mixlens",  # the same figure gives the same bytes
}


class PaperFigure(Figure):
    """A Figure that pyplot does not manage and that notebooks display."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figure in the format of the file ending; pdf and svg are vector formats."""
        kind = Path(path).suffix.lstrip(".") or "png"
        return write_file(path, lambda: self._bytes(kind, bbox_inches="tight"))

    def png(self, dpi: int = 220) -> bytes:
        return self._bytes("png", dpi=dpi)

    def svg(self) -> bytes:
        """Return the figure as SVG, with text as paths, without a background, light or dark as the page is."""
        return with_dark(self._bytes("svg", facecolor="none", metadata={"Date": None}))

    def pdf(self) -> bytes:
        return self._bytes("pdf", bbox_inches="tight", metadata={"CreationDate": None})

    def _bytes(self, form: str, **options: Any) -> bytes:
        file = io.BytesIO()
        with matplotlib.rc_context(PAPER):
            self.savefig(file, format=form, **options)
        return file.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png(dpi=150)


class PaperAxes(Axes):
    """Axes that notebooks display when they are the value of a cell."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figure of these axes in the format of the file ending; pdf and svg are vector formats."""
        return own_figure(self).save(path)

    def _repr_png_(self) -> bytes:
        return own_figure(self)._repr_png_()


def own_figure(ax: Axes) -> PaperFigure:
    """Return the figure of axes made by `drawing`."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, PaperFigure)
    return figure


def paper_figure(width: float, height: float) -> PaperFigure:
    """Return an empty figure of a size in inches; create it and draw on it within `paper()`."""
    return PaperFigure(figsize=(width, height), layout="constrained")


def paper() -> Any:
    """Return a context in which new Axes have the paper style; it leaves the global style unchanged."""
    return matplotlib.rc_context(PAPER)


def add_axes(figure: Figure, rows: int = 1, columns: int = 1, index: int = 1) -> PaperAxes:
    ax = figure.add_subplot(rows, columns, index, axes_class=PaperAxes)
    assert isinstance(ax, PaperAxes)
    # Ticks are created at the first draw with the rc of that moment; sizes set here persist.
    ax.tick_params(labelsize=PAPER["xtick.labelsize"], width=0.6, length=2.5)
    return ax


@contextmanager
def drawing(ax: Axes | None, width: float = COLUMN, height: float = 2.4) -> Iterator[Axes]:
    """Yield the caller's Axes unchanged, or new ones in paper style."""
    if ax is not None:
        yield ax
        return
    with paper():
        yield add_axes(paper_figure(width, height))


def relative_size(factor: float) -> float:
    """Return a font size in points relative to the style, at least the smallest legible in print."""
    return max(SMALLEST, matplotlib.rcParams["font.size"] * factor)


def heading(ax: Axes, title: str, note: str) -> None:
    """Write a title over a small, wrapped note, aligned with the figure's left edge unless axes are side by side."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    alone = isinstance(ax, PaperAxes) and _columns(ax) == 1
    inches = figure.get_size_inches()[0] * (0.98 if alone else ax.get_position().width)
    x = blended_transform_factory(figure.transFigure, ax.transAxes) if alone else ax.transAxes
    size = relative_size(0.8)
    lines = textwrap.wrap(printable(note), max(24, int(inches * 72 / (size * 0.56))))
    small_print = ax.annotate(
        "\n".join(lines),
        (0.01 if alone else 0, 1),
        xytext=(0, 4),
        xycoords=x,
        textcoords="offset points",
        va="bottom",
        fontsize=size,
        color=MUTED,
        linespacing=1.15,
        annotation_clip=False,
        gid="note",
    )
    small_print.set_in_layout(False)  # the title above reserves its height; its width must not narrow the axes
    bold = relative_size(1.06)
    shown = "\n".join(textwrap.wrap(printable(title), max(20, int(inches * 72 / (bold * 0.66)))))
    written = ax.set_title(shown, loc="left", pad=6 + len(lines) * size * 1.2, fontweight="bold")
    if alone:
        written.set_x(0.01)
        written.set_transform(x + ax.titleOffsetTrans)  # pyright: ignore[reportAttributeAccessIssue]


def _columns(ax: Axes) -> int:
    place = ax.get_subplotspec()
    return 1 if place is None else place.get_gridspec().ncols


def note_of(ax: Axes) -> str:
    """Return the note that `heading` wrote under the title of `ax`."""
    return " ".join(t.get_text() for t in ax.texts if t.get_gid() == "note").replace("\n", " ")


def legend_below(ax: Axes, columns: int = 2, *, also: float = 0.0) -> None:
    """Put a legend below the axis label, from the left edge of the axes, in as many columns as fit.

    `also` is the height in points of other elements below the axes, such as long tick labels.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    handles, names = ax.get_legend_handles_labels()
    longest = max(map(len, names), default=0) + 6
    room = figure.get_size_inches()[0] * ax.get_position().width * 72 / (0.6 * SMALLEST)
    place = ax.transAxes + ScaledTranslation(0, -(34 + also) / 72, figure.dpi_scale_trans)
    ax.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=place,
        borderaxespad=0,
        ncols=max(1, min(columns, int(room / longest))),
        fontsize=SMALLEST,
        columnspacing=1,
    )


def name_points(ax: Axes, points: Sequence[tuple[float, float, str]], size: float) -> None:
    """Write each name beside its point, on the side where it covers the fewest points and names.

    Call it after scales and limits are set.
    """
    places = [(ax.transData.transform((x, y)) * 72 / _dpi(ax)).tolist() for x, y, _ in points]
    taken = [Bbox.from_bounds(left - 2, bottom - 2, 4, 4) for left, bottom in places]
    for (x, y, text), (left, bottom) in zip(points, places, strict=True):
        name = printable(text)
        width, height = 0.62 * size * len(name), size
        sides = [(3 + (0 if right else -6 - width), 3 if up else -3 - height) for up in (1, 0) for right in (1, 0)]
        boxes = [Bbox.from_bounds(left + right, bottom + up, width, height) for right, up in sides]
        best = min(range(4), key=lambda i: boxes[i].count_overlaps(taken))
        taken.append(boxes[best])
        beside = {"xytext": sides[best], "textcoords": "offset points", "va": "bottom"}
        ax.annotate(name, (x, y), fontsize=size, color=MUTED, **beside)


def _dpi(ax: Axes) -> float:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure.dpi


def drop_note(ax: Axes, title: str) -> None:
    """Replace title and note by a short title, for panels whose neighbour already has the note."""
    for text in list(ax.texts):
        if text.get_gid() == "note":
            text.remove()
    ax.set_title(printable(title), loc="left", fontweight="bold", pad=3)


def percent(value: float, position: float | None = None) -> str:
    """Format the tick label of a share."""
    return f"{100 * value:.4g} %"


def printable(text: object, families: Sequence[str] = ("DejaVu Sans",)) -> str:
    """Escape `text` for matplotlib, so that it is never read as a formula.

    Characters that no font of `families` has become □.
    """
    known = frozenset[int]().union(*map(_characters, families))
    return "".join(r"\$" if c == "$" else c if ord(c) in known or c == "\n" else "□" for c in str(text))


def in_legend(text: object) -> str:
    """Escape `text` for a legend, which would skip labels that begin with an underscore."""
    shown = printable(text)
    return f"\u200b{shown}" if shown.startswith("_") else shown


@cache
def families(first: str) -> list[str]:
    """Return `first` and the installed fallback fonts for characters it lacks: symbols, Chinese, emoji."""
    there = set(font_manager.get_font_names())
    return [first, *(name for name in _STAND_INS if name in there)]


@cache
def _characters(family: str) -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(family))
    return frozenset(font.get_charmap())
