"""Pieces of a page: the page itself, figures, and escaping. Every text that is not ours goes through `escape`."""

from __future__ import annotations

import base64
from html import escape as _escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixlens.show.live import ALL, asset, module_script
from mixlens.show.style import INK, MUTED, PaperFigure

# No request of any kind can leave the page: scripts and styles are its own, pictures are data.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:; img-src data:"
_DARK = f"""<style>@media (prefers-color-scheme: dark) {{
[style*="fill: {INK}"] {{ fill: #e8e8ee !important }} [style*="stroke: {INK}"] {{ stroke: #e8e8ee !important }}
[style*="fill: {MUTED}"] {{ fill: #a9a9b5 !important }} [style*="stroke: {MUTED}"] {{ stroke: #a9a9b5 !important }}
}}</style>"""


def escape(text: object) -> str:
    return _escape(str(text), quote=True)


def page(title: str, body: str) -> str:
    """A whole page that loads nothing: style sheet and module inside, tables sortable, views live."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{asset('report.css')}</style>"
        f"<script>{module_script(*ALL)}.then(m=>m.ready(document))</script></head>"
        f"<body>{body}</body></html>\n"
    )


def picture(drawn: Axes | Figure, alt: str, caption: str) -> str:
    """A figure as an SVG picture: text as paths, and its ink light on a dark page."""
    figure = drawn.get_figure(root=True) if isinstance(drawn, Axes) else drawn
    assert isinstance(figure, PaperFigure)
    head, body = figure.svg().decode("utf-8").split("<defs>", 1)
    source = base64.b64encode(f"{head}{_DARK}<defs>{body}".encode()).decode("ascii")
    width = round(figure.get_size_inches()[0] * 140)
    wide = ' class="wide" tabindex="0"' if width > 700 else ""  # on a phone it scrolls instead of shrinking
    return (
        f'<figure style="max-width:{width}px"><div{wide}><img alt="{escape(alt)}" '
        f'src="data:image/svg+xml;base64,{source}"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def paragraphs(*texts: str) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts if text)


def bullets(texts: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""
