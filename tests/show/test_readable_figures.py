"""Every figure of the gallery can be read: size of text, contrast in light and dark, labels that do not overlap."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import numpy as np
import pytest
from gallery import FIGURES, figures_of, generated
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from show_samples import make_trace

from mixlens.plot.colours import (
    DARK_GROUND,
    EXPERT_COLOURS,
    GROUND,
    SERIES_COLOURS,
    contrast,
    expert_colours,
    layer_colours,
    series_colours,
)
from mixlens.plot.dark import in_dark
from mixlens.plot.style import SMALLEST
from mixlens.trace.trace import Trace


def other_choices() -> Trace:
    """The tokens of `make_trace` with the experts of another."""
    trace, other = make_trace(), make_trace(seed=1)
    parts = {name: other.read(name) for name in ("weight", "router_logits")}
    tokens = {name: trace.read(name) for name in ("sequence", "token_id", "logprob")}
    return Trace.from_arrays(
        other.read("expert_id"), n_experts=8, **parts, tokens=tokens, sequences=trace.sequences, meta=trace.meta
    )


SMALL = figures_of(make_trace, other_choices)
WIDE = {
    f"{shape}-{name}": draw
    for shape in ((32, 8, 2), (48, 128, 8))
    for name, draw in figures_of(lambda s=shape: generated(*s), lambda s=shape: generated(*s, seed=1)).items()
}


def drawn(draw: Any) -> Figure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = draw()
    figure = made if isinstance(made, Figure) else made.get_figure(root=True)
    FigureCanvasAgg(figure).draw()
    return figure


def on_ground(colour: Any, ground: str) -> str:
    """What a colour with transparency is seen as."""
    *rgb, alpha = to_rgba(colour)
    return to_hex(alpha * np.array(rgb) + (1 - alpha) * np.array(to_rgba(ground)[:3]))


def texts(figure: Figure) -> list[Text]:
    """All texts but tick labels beyond the limits of an axis, which exist and are not drawn."""
    beyond = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {id(t.label1) for t in (*axis.majorTicks, *axis.minorTicks) if not low <= t.get_loc() <= high}
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in beyond]
    return [t for t in found if t.get_window_extent().width]


def behind(text: Text) -> str:
    """The colour of the cell that a text is in, else the ground."""
    if text.axes is None or text not in text.axes.texts:
        return GROUND
    for mesh in text.axes.findobj(QuadMesh):
        rows, columns = (n - 1 for n in mesh.get_coordinates().shape[:2])
        x, y = text.get_position()
        if text.get_transform() == text.axes.transData and 0 <= x < columns and 0 <= y < rows:
            values = np.ma.masked_invalid(mesh.get_array()).reshape(rows, columns)
            value = values[int(y), int(x)]
            return to_hex(text.axes.get_facecolor() if value is np.ma.masked else mesh.cmap(mesh.norm(value)))
    return GROUND


def marks(figure: Figure):
    """Colours of lines, whiskers, points and bars: the face, or the edge around it."""
    for ax in figure.axes:
        for line in ax.lines:
            yield from ([line.get_color()] if line.get_linestyle() not in ("None", "") else [])
            yield from ([line.get_markeredgecolor()] if line.get_marker() not in ("None", "", None) else [])
        for collection in ax.collections:
            if isinstance(collection, LineCollection):
                yield from collection.get_edgecolors()
        for bars in ax.containers:
            for bar in getattr(bars, "patches", []):
                yield bar.get_edgecolor() if bar.get_linewidth() else bar.get_facecolor()


def check(figure: Figure) -> None:
    found = texts(figure)
    assert found
    for text in found:
        assert text.get_fontsize() >= SMALLEST - 1e-6, (text.get_text(), text.get_fontsize())
        ground = behind(text)
        ink = on_ground(text.get_color(), ground)
        assert contrast(ink, ground) >= 4.5, (text.get_text(), ink, ground)
        dark = DARK_GROUND if ground == GROUND else in_dark(ground)
        assert contrast(in_dark(ink), dark) >= 4.5, (text.get_text(), in_dark(ink), dark)
    for colour in {on_ground(colour, GROUND) for colour in marks(figure)}:
        assert contrast(colour, GROUND) >= 3, colour
        assert contrast(in_dark(colour), DARK_GROUND) >= 3, (colour, in_dark(colour))
    outside = [t for t in found if (t.axes is None or t not in t.axes.texts) and t.get_rotation() % 90 == 0]
    boxes = [(t.get_text(), t.get_window_extent()) for t in outside]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 2 or down < 2, (one, other)


@pytest.mark.parametrize("name", SMALL)
def test_figures_of_a_trace_can_be_read(name):
    check(drawn(SMALL[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_the_gallery_can_be_read(name):
    check(drawn(FIGURES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_figures_of_wide_models_can_be_read_and_are_small(name):
    figure = drawn(WIDE[name])
    check(figure)
    assert len(figure.svg()) < 700_000


def test_experts_and_what_else_is_told_apart_share_no_colour():
    assert not set(expert_colours(64)) & set(series_colours(64))
    for colour in (*EXPERT_COLOURS, *SERIES_COLOURS, *layer_colours(32), *expert_colours(128), *series_colours(32)):
        assert min(contrast(colour, GROUND), contrast(colour, DARK_GROUND)) >= 3, colour


@pytest.mark.parametrize("colour", ["#ffffff", "#d6d6dc", "#67001f", "#053061", "#1b1b1f", "#f4a582"])
def test_a_dark_page_keeps_every_contrast(colour):
    for other in ("#ffffff", "#2166ac", "#5c5c66"):
        assert contrast(in_dark(colour), in_dark(other)) == pytest.approx(contrast(colour, other), rel=0.03)


def test_every_colour_of_a_saved_picture_has_its_dark_one():
    svg = drawn(SMALL["share_heatmap"]).svg().decode()
    for kind, colour in re.findall(r"(?<!--)(fill|stroke): (#[0-9a-f]{6})", svg):
        assert f"{kind}: {colour}; --{kind}: {in_dark(colour)}" in svg
