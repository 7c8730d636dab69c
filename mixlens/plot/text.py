"""A passage of text, each token underlined in the colour of the expert it was given to (Mixtral paper, Fig. 8)."""

from __future__ import annotations

import unicodedata

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mixlens.errors import BadInput
from mixlens.plot.style import MUTED, PAGE, drawing, expert_colours, families, heading, own_figure, printable
from mixlens.trace.trace import Trace

_FAMILY = "DejaVu Sans Mono"
_SIZE, _ADVANCE, _LINE = 7.0, 0.602, 2.5  # points; width of a character and height of a line, both in sizes


def text(
    trace: Trace, ax: Axes | None = None, *, sequence: int | None = None, layer: int | None = None, start: int = 0
) -> Axes:
    """Tokens of one sequence: thick underline and digit for the first choice, thin underline for the second.

    sequence   sequence number; the first one when not given
    layer      layer number; the middle one when not given
    start      first token shown; as many follow as fit into the axes

    Raises BadInput for a sequence or layer that is not there.
    """
    number, layer = sequence_number(trace, sequence), layer_number(trace, layer)
    one = trace.select(where=trace.sequences.index.to_series() == number, layers=[layer])
    choices = one.read("expert_id")[start:, 0, :]
    if "token_id" in one.signals:
        pieces = one.pieces(one.read("token_id")[start:])
    else:
        pieces = [f"t{start + i}" for i in range(len(choices))]
    with drawing(ax, PAGE, 2.6) as drawn:
        if ax is None:  # the type is set to a grid of characters, which a layout engine must not move afterwards
            own_figure(drawn).set_layout_engine("none")
            drawn.set_position((0.01, 0.01, 0.98, 0.84))
        drawn.set_axis_off()
        shown = _flow(drawn, pieces, choices, expert_colours(trace.n_experts))
        until = "" if start + shown == start + len(pieces) else f" (tokens {start} to {start + shown - 1})"
        heading(
            drawn,
            f"Sequence {number}, layer {layer}",
            f"n = {shown:,} of {start + len(pieces):,} tokens{until}; "
            "thick underline and digit: first choice; thin: second",
        )
    return drawn


def sequence_number(trace: Trace, sequence: int | None) -> int:
    """The sequence asked for, else the first; BadInput when it is not there."""
    if not isinstance(trace, Trace):
        raise BadInput(
            f"A text was to be shown with its routing. A {type(trace).__name__} was given. Give a trace, as ml.record "
            "or ml.open gives it.",
            argument="trace",
            value=type(trace).__name__,
        )
    numbers = trace.sequences.index
    if len(numbers) and (sequence is None or sequence in numbers):
        return int(numbers[0] if sequence is None else sequence)
    found = f"numbers {numbers[0]} to {numbers[-1]}" if len(numbers) else "no sequences"
    raise BadInput(
        f"Sequence {sequence} was to be shown. The trace has {found}. Give one of trace.sequences.index.",
        argument="sequence",
        value=sequence,
    )


def layer_number(trace: Trace, layer: int | None) -> int:
    """The layer asked for, else the middle one; BadInput when it is not there."""
    if layer is None:
        return int(trace.layers[trace.n_layers // 2])
    if layer not in trace.layers:
        raise BadInput(
            f"Layer {layer} was to be shown. The trace has layers {', '.join(map(str, trace.layers))}. "
            "Give one of them.",
            argument="layer",
            value=layer,
        )
    return int(layer)


def _flow(ax: Axes, pieces: list[str], choices: np.ndarray, colours: list[str]) -> int:
    """Set the tokens line by line until the axes are full; returns how many fitted."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    box = ax.get_position()
    width, height = figure.get_size_inches() * 72
    columns = max(8, int(box.width * width / (_SIZE * _ADVANCE)))
    lines = max(1, int(box.height * height / (_SIZE * _LINE)))
    ax.set_xlim(0, columns)
    ax.set_ylim(lines, 0)
    line = column = 0
    for i, piece in enumerate(pieces):
        shown = _visible(piece)
        cells = min(_cells(shown), columns)
        if column + cells > columns:
            line, column = line + 1, 0
        if line >= lines:
            return i
        _token(ax, column, line, shown[:columns], cells, [(int(e), colours[e]) for e in choices[i]])
        column += cells
        if "\n" in piece:
            line, column = line + 1, 0
    return len(pieces)


def _visible(piece: str) -> str:
    """A token's text on one line; invisible characters get a sign, and an empty token a middle dot."""
    signs = {"\n": "⏎", "\t": "→", "\r": "␍", "⟨": "‹", "⟩": "›"}
    shown = "".join(signs.get(c, c if c.isprintable() else "□") for c in piece)
    return shown or "·"


def _cells(shown: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)


def _token(ax: Axes, column: int, line: int, shown: str, cells: int, choices: list[tuple[int, str]]) -> None:
    ax.text(
        column,
        line + 0.42,
        printable(shown, families(_FAMILY)),
        family=families(_FAMILY),
        fontsize=_SIZE,
        va="baseline",
        in_layout=False,
    )
    left, width = column + 0.06, cells - 0.12
    (first, colour), *others = choices
    ax.add_patch(Rectangle((left, line + 0.52), width, 0.10, facecolor=colour, linewidth=0))
    for depth, (_, other) in enumerate(others[:3]):
        ax.add_patch(Rectangle((left, line + 0.645 + 0.06 * depth), width, 0.04, facecolor=other, linewidth=0))
    ax.text(
        column + cells / 2,
        line + 0.94,
        str(first),
        fontsize=_SIZE * 0.62,
        color=MUTED,
        ha="center",
        va="baseline",
        in_layout=False,
    )
