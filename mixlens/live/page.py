"""A self-contained HTML page with sortable tables and live views."""

from __future__ import annotations

from pathlib import Path

from mixlens.live.bundle import module_script
from mixlens.plot.html import escape

_STYLE = Path(__file__).parent / "assets" / "report.css"
# The page can make no request: scripts and styles are inline, pictures are data.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:; img-src data:"


def page(title: str, body: str) -> str:
    """Return a self-contained page with style sheet and module, sortable tables and live views."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text('utf-8')}</style>"
        f"<script>{module_script()}.then(m=>m.ready(document))</script></head>"
        f"<body>{body}</body></html>\n"
    )
