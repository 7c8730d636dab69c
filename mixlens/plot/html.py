"""Figures, tables and other elements of an HTML page. All external text passes through `escape`."""

from __future__ import annotations

import base64
from html import escape as _escape

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from mixlens.core.text import MISSING
from mixlens.plot.style import DIVERGING, PaperFigure


def escape(text: object) -> str:
    return _escape(str(text), quote=True)


def picture(drawn: Axes | Figure, alt: str, caption: str) -> str:
    """Return a figure as an SVG picture with text as paths."""
    figure = drawn.get_figure(root=True) if isinstance(drawn, Axes) else drawn
    assert isinstance(figure, PaperFigure)
    source = base64.b64encode(figure.svg()).decode("ascii")
    width = round(figure.get_size_inches()[0] * 140)
    wide = ' class="wide" tabindex="0"' if width > 700 else ""  # on a phone it scrolls instead of shrinking
    return (
        f'<figure style="max-width:{width}px"><div{wide}><img alt="{escape(alt)}" '
        f'src="data:image/svg+xml;base64,{source}"></div>'
        f"<figcaption>{escape(' '.join(filter(None, [caption, reading(figure)])))}</figcaption></figure>"
    )


def reading(figure: Figure) -> str:
    """Return sentences on how to read the figure: colours of maps, and intervals of points and bars."""
    maps = [mesh for ax in figure.axes for mesh in ax.collections if isinstance(mesh, QuadMesh)]
    said = []
    if any(mesh.get_cmap().name == DIVERGING for mesh in maps):
        said.append("Red is above the middle of the scale, blue below it; grey has no value.")
    elif maps:
        said.append("The deeper the colour, the larger the number; grey has no value.")
    plain = [ax for ax in figure.axes if not any(isinstance(mesh, QuadMesh) for mesh in ax.collections)]
    if any(isinstance(lines, LineCollection) for ax in plain for lines in ax.collections):
        said.append("A thin line through a point or bar is its interval.")
    return " ".join(said)


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def paragraphs(*texts: str) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts if text)


def bullets(texts: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def frame_table(frame: pd.DataFrame, caption: str) -> str:
    """Return a sortable table with every cell escaped and missing values as n/a."""
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in frame.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in frame.itertuples(index=False, name=None))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if value is pd.NA:
        return f'<td data-v="">{MISSING}</td>'
    if isinstance(value, float | int):
        shown = f"{value:,.0f}" if abs(value) >= 1e4 and float(value).is_integer() else f"{value:.6g}"
        return f'<td data-v="">{MISSING}</td>' if value != value else f'<td data-v="{value:.12g}">{shown}</td>'
    return f"<td>{escape(value)}</td>"
