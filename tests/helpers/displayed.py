"""What is displayed, read back: numbers in text, tables of pages, Markdown and LaTeX, and the artists of figures.

Readers take what a person sees (labels, heights, colours), and know nothing of what drew it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

_NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_INTERVAL = re.compile(r"([-+]?[\d,.]+)(?: %| bits)? \[([-+]?[\d,.]+), ([-+]?[\d,.]+)\]")
_EMPTY = {"meta", "link", "img", "br", "input", "hr"}


def numbers(text: str) -> list[float]:
    """Every number in a text, in order, without thousands separators."""
    return [number(found.rstrip(",")) for found in _NUMBER.findall(text)]


def number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def intervals(text: str) -> list[tuple[float, float, float]]:
    """Every "12.3 % [11.9, 12.8]" as (estimate, low, high)."""
    return [(number(a), number(b), number(c)) for a, b, c in _INTERVAL.findall(text)]


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """The elements of a page, with the text that a reader sees in each; scripts and styles are not text.

    tables   rows of cell texts, a list a table;  keys  their sort keys, None where a cell has none
    """

    html: str
    elements: list[Element] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    keys: list[list[list[str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[Element] = []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attrs):
        made = Element(tag, dict(attrs))
        self.elements.append(made)
        if tag not in _EMPTY:
            self._open.append(made)
        if tag == "table":
            self.tables.append([])
            self.keys.append([])
        if tag == "tr":
            self.tables[-1].append([])
            self.keys[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.keys[-1][-1].append(made.attributes.get("data-v"))

    def handle_endtag(self, tag):
        while self._open and self._open.pop().tag != tag:
            pass

    def handle_data(self, data):
        if any(one.tag in ("script", "style") for one in self._open):
            return
        for one in self._open:
            one.text += data
        if any(one.tag in ("td", "th") for one in self._open):
            small = any(one.tag == "small" for one in self._open)
            self.tables[-1][-1][-1] += f" [{data}]" if small else data

    def of(self, tag: str) -> list[Element]:
        return [one for one in self.elements if one.tag == tag]

    def texts(self, tag: str) -> list[str]:
        return [one.text for one in self.of(tag)]

    @property
    def text(self) -> str:
        """All that is shown, and the words of pictures."""
        roots = [one.text for one in self.elements if one.tag in ("html", "div", "figure", "table", "p", "details")]
        return " ".join([*roots, *(str(one.attributes.get("alt")) for one in self.of("img"))])


def markdown_rows(text: str) -> list[list[str]]:
    """Cells of the first Markdown table, as a renderer reads them; without the row of dashes."""
    found = []
    for line in text.split("\n"):
        if line.startswith("|"):
            parts = re.findall(r"(?:\\.|[^|\\])+", line)  # a bar behind a backslash divides nothing
            found.append([re.sub(r"\\(.)", r"\1", part).strip() for part in parts])
    return [row for i, row in enumerate(found) if i != 1]


_LATEX_SIGNS = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", "--": "–"}
_LATEX_SIGNS |= {rf"\{c}": c for c in "&%$#_{}"}
_LATEX = re.compile("|".join(re.escape(sign) for sign in sorted(_LATEX_SIGNS, key=len, reverse=True)))


def latex_rows(text: str) -> list[list[str]]:
    """Cells of a tabular as they would be printed."""
    rows = [line.removesuffix(r" \\") for line in text.split("\n") if line.endswith(r" \\")]
    return [[_LATEX.sub(lambda m: _LATEX_SIGNS[m[0]], cell) for cell in re.split(r" (?<!\\)& ", row)] for row in rows]


# ------------------------------------------------------------------ figures


def bars(ax: Axes) -> np.ndarray:
    """Heights [group, bar]."""
    return np.array([[bar.get_height() for bar in group] for group in ax.containers])


def whiskers(ax: Axes) -> list[tuple[float, float, float]]:
    """Vertical strokes as (x, low, high), in the order drawn."""
    found = []
    for drawn in ax.collections:
        if hasattr(drawn, "get_segments"):
            for (x, low), (end, high) in filter(len, drawn.get_segments()):  # a missing stroke is empty
                if x == end:
                    found.append((float(x), float(low), float(high)))
    return found


def level_whiskers(ax: Axes) -> list[tuple[float, float, float]]:
    """Horizontal strokes as (y, low, high), in the order drawn."""
    found = []
    for drawn in ax.collections:
        if hasattr(drawn, "get_segments"):
            for (low, y), (high, end) in filter(len, drawn.get_segments()):
                if y == end and low != high:
                    found.append((float(y), float(low), float(high)))
    return found


def band(ax: Axes, number: int = 0) -> dict[float, tuple[float, float]]:
    """Ends of a filled band at every x."""
    filled = [
        drawn for drawn in ax.collections if type(drawn).__name__ in ("PolyCollection", "FillBetweenPolyCollection")
    ]
    ends: dict[float, list[float]] = {}
    for x, y in filled[number].get_paths()[0].vertices.tolist():
        ends.setdefault(x, []).append(y)
    return {x: (min(ys), max(ys)) for x, ys in ends.items()}


def marks(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the marks that the legend calls `label`."""
    line = next(line for line in ax.lines if line.get_label() == label)
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def colours_by_label(ax: Axes) -> dict[str, str]:
    """What the legend says each colour is."""
    handles, labels = ax.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        one = handle[0] if isinstance(handle, Sequence) else handle
        colour = one.get_facecolor() if hasattr(one, "get_facecolor") else one.get_color()
        found[label] = to_hex(np.asarray(colour)[:3] if not isinstance(colour, str) else colour)
    return found


def ticks(ax: Axes, axis: str) -> dict[float, str]:
    """Labels of an axis by their place."""
    places = getattr(ax, f"get_{axis}ticks")()
    labels = [label.get_text() for label in getattr(ax, f"get_{axis}ticklabels")()]
    return {float(place): label for place, label in zip(places, labels, strict=True)}


def cells(ax: Axes) -> np.ndarray:
    """Numbers of a heat map as they stand on the axes [row, column]; NaN where nothing is coloured."""
    mesh = next(drawn for drawn in ax.collections if type(drawn).__name__ == "QuadMesh")
    corners = mesh.get_coordinates()
    shape = corners.shape[0] - 1, corners.shape[1] - 1
    return np.ma.filled(np.ma.asarray(mesh.get_array(), float), np.nan).reshape(shape)


def scale(ax: Axes) -> tuple[float, float]:
    """Numbers at the ends of the colour scale."""
    mesh = next(drawn for drawn in ax.collections if type(drawn).__name__ == "QuadMesh")
    return mesh.get_clim()


def words(ax: Axes) -> list[str]:
    """Texts on the axes but for the note under the title."""
    return [text.get_text() for text in ax.texts if text.get_gid() != "note"]


def note(ax: Axes) -> str:
    return " ".join(text.get_text() for text in ax.texts if text.get_gid() == "note").replace("\n", " ")


def title(ax: Axes) -> str:
    return ax.get_title(loc="left").replace("\n", " ")


def marked(ax: Axes) -> set[tuple[int, int]]:
    """The cells (row, column) of a map with a dot or a bold number."""
    bold = [text.get_position() for text in ax.texts if text.get_fontweight() == "bold"]
    dots = [place for line in ax.lines if line.get_marker() == "." for place in zip(*line.get_data(), strict=True)]
    return {(int(y), int(x)) for x, y in (*bold, *dots)}
