"""SVG pictures for dark pages: luminances are inverted so that contrasts stay the same as on light pages."""

from __future__ import annotations

import base64
import io
import re
from functools import cache

from PIL import Image

from mixlens.plot.colours import at_luminance, expert_colours, luminance, series_colours

_RULES = """<style>.dark { display: none }
@media (prefers-color-scheme: dark) { [style*="--fill"] { fill: var(--fill) !important }
[style*="--stroke"] { stroke: var(--stroke) !important } .light { display: none } .dark { display: inline } }</style>"""
_COLOUR = re.compile(r"(fill|stroke): (#[0-9a-f]{6})")
_IMAGE = re.compile(r'<image ([^>]*?)xlink:href="data:image/png;base64,\s*([^"]*)"([^>]*)/>', re.DOTALL)
_PRODUCT = (1 + 0.05) * (0 + 0.05)  # black becomes white
_KEPT = {*expert_colours(512), *series_colours(64)}  # readable on both backgrounds without change


@cache
def in_dark(colour: str) -> str:
    """Return the colour on a dark page: white and black are swapped, palette colours stay the same."""
    if colour in _KEPT:
        return colour
    return at_luminance(colour, _PRODUCT / (luminance(colour) + 0.05) - 0.05)


def with_dark(svg: bytes) -> bytes:
    """Return an SVG picture from matplotlib that follows the colour scheme of the page."""
    head, body = svg.decode("utf-8").split("<defs>", 1)
    body = _COLOUR.sub(lambda found: f"{found[0]}; --{found[1]}: {in_dark(found[2])}", body)
    body = _IMAGE.sub(_both, body)
    return f"{head}{_RULES}<defs>{body}".encode()


def _both(found: re.Match[str]) -> str:
    before, data, after = found.groups()
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA").quantize(256)
    light = _image(picture, before, after, "light")
    colours, step = picture.getpalette("RGBA") or [], 4
    for at in range(0, len(colours), step):
        changed = in_dark("#{:02x}{:02x}{:02x}".format(*colours[at : at + 3]))
        colours[at : at + 3] = [int(changed[i : i + 2], 16) for i in (1, 3, 5)]
    picture.putpalette(colours, "RGBA")
    return light + _image(picture, before.replace('id="', 'id="dark-'), after, "dark")


def _image(picture: Image.Image, before: str, after: str, name: str) -> str:
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<image class="{name}" {before}xlink:href="data:image/png;base64,{data}"{after}/>'
