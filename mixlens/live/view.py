"""View: a text/html output that is live where scripts may run, and a static picture elsewhere."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from mixlens.core.files import write_file
from mixlens.core.text import NO_INTERVAL
from mixlens.live.bundle import mount_script
from mixlens.live.page import page
from mixlens.plot import labels
from mixlens.plot.style import PaperFigure

_CELL = "padding:2px 8px;text-align:left;border-bottom:1px solid #d6d6dc"
_PICTURE_COLOURS = 64  # of the static picture; a palette is a third of the size


@dataclass(frozen=True)
class View:
    """A live view with its static form, as returned by the functions of `ml.view`.

    Parameters
    ----------
    title : str
        Title of the page that `to_html` makes.
    kind : str
        Name of the view in the JavaScript module.
    static : str
        HTML to show where scripts may not run: picture with alt text, caption and table.
    packed : str
        The data, from ``mixlens.live.payload.pack``.

    Examples
    --------
    >>> view = ml.view.share_heatmap(ml.stats.expert_share(trace))
    >>> view.title
    'Expert share'
    """

    title: str
    kind: str
    static: str
    packed: str

    def __repr__(self) -> str:
        return f"View: {self.title}"

    def _repr_html_(self) -> str:
        return self.fragment(load=True)

    def fragment(self, *, load: bool) -> str:
        """Return the view as a piece of HTML.

        Parameters
        ----------
        load : bool
            Whether to include the JavaScript module.

        Returns
        -------
        str

        Examples
        --------
        >>> view = ml.view.share_heatmap(ml.stats.expert_share(trace))
        >>> view.fragment(load=True).startswith('<div class="mixlens">')
        True
        """
        return f'<div class="mixlens">{self.static}</div>{mount_script(self.kind, self.packed, load=load)}'

    def to_html(self) -> str:
        """Return the view as a self-contained page.

        Returns
        -------
        str

        Examples
        --------
        >>> view = ml.view.share_heatmap(ml.stats.expert_share(trace))
        >>> view.to_html().startswith("<!doctype html>")
        True
        """
        return page(self.title, f"<main>{self.fragment(load=False)}</main>")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the view as a self-contained page.

        Parameters
        ----------
        path : str or path-like
            Path of the file, which is overwritten.

        Returns
        -------
        pathlib.Path

        Examples
        --------
        >>> view = ml.view.share_heatmap(ml.stats.expert_share(trace))
        >>> view.save(tmp / "share.html").name
        'share.html'
        """
        return write_file(path, self.to_html)

    def widget(self) -> Any:
        """Return the view as an anywidget, for callbacks in Python.

        Its trait `selection` is {"layer": ..., "expert": ..., "domain": ...}, the last choice in any view of the page;
        observe it with ``widget.observe(f, "selection")``. Setting ``widget.asked = {"layer": 3}`` moves the views.

        A widget disappears with its kernel, unless the notebook saves widget states; the folded picture below it
        remains. For lasting output, display the view itself.

        Returns
        -------
        anywidget.AnyWidget

        Examples
        --------
        >>> widget = ml.view.share_heatmap(ml.stats.expert_share(trace)).widget()
        >>> widget.asked = {"layer": 3}
        """
        from mixlens.live.widget import ViewWidget

        summary = f"<summary>Without a kernel: {html.escape(self.title)}, as a picture</summary>"
        static = f"<details>{summary}{self.static}</details>"
        return ViewWidget(kind=self.kind, packed=self.packed, static=static)


def static_form(drawn: Axes | Figure, caption: str, table: str, *, dpi: int = 110) -> str:
    """Return picture, caption and table with inline styles only, which HTML sanitisers keep."""
    text = html.escape(caption)
    return (
        f'<figure style="margin:0"><img alt="{text}" style="max-width:100%;background:#fff" '
        f'src="data:image/png;base64,{_small_png(drawn, dpi)}"><figcaption>{text}</figcaption></figure>{table}'
    )


def static_table(columns: Mapping[str, Sequence[str]], caption: str) -> str:
    """Return columns of text as a table that HTML sanitisers keep."""
    head = "".join(f'<th style="{_CELL}">{html.escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    return (
        f'<table style="border-collapse:collapse"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _small_png(drawn: Axes | Figure, dpi: int) -> str:
    figure = drawn.get_figure(root=True) if isinstance(drawn, Axes) else drawn
    assert isinstance(figure, PaperFigure)
    whole = Image.open(io.BytesIO(figure.png(dpi=dpi))).convert("RGB")
    drawn_on = ImageChops.invert(whole).getbbox() or (0, 0, *whole.size)
    picture = whole.crop((0, 0, whole.width, min(whole.height, drawn_on[3] + dpi // 10))).quantize(_PICTURE_COLOURS)
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def extremes(data: xr.Dataset, centre: float, rows: int = 8) -> str:
    """Return a table of the numbers furthest from `centre`, with interval and n, for readers without scripts."""
    frame = data[["estimate", "ci_low", "ci_high"]].assign(n=xr.zeros_like(data["estimate"]) + data["n"])
    dims = [str(d) for d in data["estimate"].dims]
    table = frame.to_dataframe(dim_order=dims)[["estimate", "ci_low", "ci_high", "n"]].dropna(subset="estimate")
    order = (table["estimate"] - centre).abs().sort_values(ascending=False, kind="stable").index[:rows]
    kept = table.loc[order].reset_index()
    columns = {name: [labels.label(v, name) for v in kept[name]] for name in dims}
    unit = " [%]" if labels.is_fraction(data) else ""
    columns |= {
        f"{labels.title(data).lower()}{unit}": [labels.plain(v, data) for v in kept["estimate"]],
        f"{labels.level(data)}": [
            f"{labels.plain(low, data)} to {labels.plain(high, data)}" if low == low else NO_INTERVAL
            for low, high in zip(kept["ci_low"], kept["ci_high"], strict=True)
        ],
        "n": [f"{int(n):,}" for n in kept["n"]],
    }
    return static_table(columns, f"Furthest from {labels.plain(centre, data)}: {len(kept)} of {len(table):,} numbers")
