"""Colours of experts, series and layers, readable on white and on dark backgrounds."""

from __future__ import annotations

from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb

# The palettes share no colour, so that the colour of an expert never means anything else. Every colour has a contrast
# of at least 3 with white and with the dark background. Each palette maximises the smallest distance (CIE 1976) between
# its colours, also as seen with protanopia and deuteranopia.
EXPERT_COLOURS = ("#747aba", "#db7d00", "#ad4831", "#7962e5", "#82605e", "#c83500", "#8c9667", "#0b9aa1")
SERIES_COLOURS = ("#0080c4", "#cf7c51", "#10765f", "#b15a97", "#7f6d17", "#009dc4", "#dd6f8e", "#85643e")
GROUND, DARK_GROUND = "#ffffff", "#17171b"
_BLACK = "#010101"  # matplotlib omits the fill attribute for pure black, which then stays black on a dark page
_DARKEST, _LIGHTEST = 0.135, 0.29  # luminance of palettes
_LAYERS = LinearSegmentedColormap.from_list("layers", ["#009dc4", "#7962e5", "#c83500"])
_GOLDEN = 0.618034


def expert_colours(n_experts: int) -> list[str]:
    """Return one colour per expert: the eight of `EXPERT_COLOURS`, then the same eight lighter and darker in turn.

    Beyond eight, colours are hard to distinguish; every figure also shows the expert's number.
    """
    return _palette(EXPERT_COLOURS, n_experts)


def series_colours(n: int) -> list[str]:
    """Return one colour per domain, load, scheme or other series of a figure; none is an expert's."""
    return _palette(SERIES_COLOURS, n)


def layer_colours(n_layers: int) -> list[str]:
    """Return one colour per layer, from the first (blue) over violet to the last (red)."""
    return [to_hex(_LAYERS(i / max(n_layers - 1, 1))) for i in range(n_layers)]


def _palette(first: tuple[str, ...], n: int) -> list[str]:
    return [_shade(first[i % len(first)], *divmod(i, len(first))) for i in range(n)]


def _shade(colour: str, again: int, place: int) -> str:
    """Return the palette colour on its first use, then lighter and darker shades of it."""
    depth = (again * _GOLDEN + 0.05 * place) % 1
    return at_luminance(colour, _DARKEST + (_LIGHTEST - _DARKEST) * depth) if again else colour


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2, from 0 (black) to 1 (white)."""
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def at_luminance(colour: str, wanted: float) -> str:
    """Return `colour` with another luminance: scaled as far as it stays a colour, then mixed with white."""
    channels, now = _linear(colour), luminance(colour)
    if not now:
        return _hex([wanted] * 3)
    scale = min(wanted / now, 1 / max(channels))
    scaled, reached = [scale * channel for channel in channels], scale * now
    white = (wanted - reached) / (1 - reached) if reached < wanted else 0.0
    return _hex([channel + (1 - channel) * white for channel in scaled])


def ink_on(colour: str) -> str:
    """Return black or white, whichever has more contrast with `colour`: at least 4.5."""
    return max((_BLACK, GROUND), key=lambda ink: contrast(ink, colour))


def _linear(colour: str) -> list[float]:
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]


def _hex(channels: list[float]) -> str:
    encoded = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in channels)
    red, green, blue = (min(max(c, 0.0), 1.0) for c in encoded)
    return to_hex((red, green, blue))
