"""A passage of text, each token underlined in the colour of its expert (Mixtral paper, Fig. 8)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mixlens.errors import BadInput
from mixlens.plot.colours import expert_colours
from mixlens.plot.style import MUTED, PAGE, SMALLEST, drawing, families, heading, own_figure, printable
from mixlens.trace.trace import Trace

_FAMILY = "DejaVu Sans Mono"
_SIZE, _ADVANCE, _LINE = 7.0, 0.602, 2.8  # font size in points; character width and line height in font sizes
_MOST_LINES, _HEADING = 8, 0.45  # lines of a new figure; inches above the text


def text(
    trace: Trace,
    ax: Axes | None = None,
    *,
    sequence: int | None = None,
    layer: int | None = None,
    start: int = 0,
    title: str | None = None,
) -> Axes:
    """Draw the tokens of one sequence with their experts.

    The thick underline and the digit mark the first choice, the thin underline the second.

    Parameters
    ----------
    trace : Trace
        Needs ``expert_id``; without ``token_id`` the tokens are numbered.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    sequence : int, optional
        Sequence number. By default the first sequence.
    layer : int, optional
        Layer number. By default the middle layer.
    start : int, optional
        First token to draw; as many follow as fit into the axes.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If the trace does not have the sequence or the layer.

    Examples
    --------
    >>> ax = ml.show.text(trace, layer=3)
    >>> ax.get_title(loc="left")
    'Sequence 0, layer 3'
    """
    number, layer = sequence_number(trace, sequence), layer_number(trace, layer)
    one = trace.select(where=trace.sequences.index.to_series() == number, layers=[layer])
    choices = one.read("expert_id")[start:, 0, :]
    if "token_id" in one.signals:
        pieces = one.pieces(one.read("token_id")[start:])
    else:
        pieces = [f"t{start + i}" for i in range(len(choices))]
    lines = min(_MOST_LINES, 1 + max((line for line, _ in _places(pieces, _columns(0.98 * PAGE))), default=0))
    height = lines * _SIZE * _LINE / 72 + 0.01
    with drawing(ax, PAGE, height + _HEADING) as drawn:
        if ax is None:  # a layout engine would shift the character grid
            own_figure(drawn).set_layout_engine("none")
            drawn.set_position((0.01, 0.0, 0.98, height / (height + _HEADING)))
        drawn.set_axis_off()
        shown = _flow(drawn, pieces, choices, expert_colours(trace.n_experts))
        until = "" if start + shown == start + len(pieces) else f" (tokens {start} to {start + shown - 1})"
        heading(
            drawn,
            title or f"Sequence {number}, layer {layer}",
            f"n = {shown:,} of {start + len(pieces):,} tokens{until}; "
            "thick underline and number, where it fits: first choice; thin: second",
        )
    return drawn


def sequence_number(trace: Trace, sequence: int | None) -> int:
    """Return `sequence`, or the first one for None; raise BadInput if the trace does not have it."""
    if not isinstance(trace, Trace):
        raise BadInput(
            f"Cannot show a text with its routing: expected a Trace, got {type(trace).__name__}. Pass what ml.record "
            "or ml.open returns.",
            argument="trace",
            value=type(trace).__name__,
        )
    numbers = trace.sequences.index
    if len(numbers) and (sequence is None or sequence in numbers):
        return int(numbers[0] if sequence is None else sequence)
    found = f"numbers {numbers[0]} to {numbers[-1]}" if len(numbers) else "no sequences"
    raise BadInput(
        f"Cannot show sequence {sequence}: the trace has {found}. Pass one of trace.sequences.index.",
        argument="sequence",
        value=sequence,
    )


def layer_number(trace: Trace, layer: int | None) -> int:
    """Return `layer`, or the middle one for None; raise BadInput if the trace does not have it."""
    if layer is None:
        return int(trace.layers[trace.n_layers // 2])
    if layer not in trace.layers:
        raise BadInput(
            f"Cannot show layer {layer}: the trace has layers {', '.join(map(str, trace.layers))}. Pass one of them.",
            argument="layer",
            value=layer,
        )
    return int(layer)


def _flow(ax: Axes, pieces: list[str], choices: np.ndarray, colours: list[str]) -> int:
    """Draw the tokens line by line until the axes are full, and return the number drawn."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    box = ax.get_position()
    width, height = figure.get_size_inches()
    columns = _columns(box.width * width)
    lines = max(1, int(box.height * height * 72 / (_SIZE * _LINE)))
    ax.set_xlim(0, columns)
    ax.set_ylim(lines, 0)
    for i, (piece, (line, column)) in enumerate(zip(pieces, _places(pieces, columns), strict=True)):
        if line >= lines:
            return i
        _token(ax, column, line, _visible(piece)[:columns], [(int(e), colours[e]) for e in choices[i]])
    return len(pieces)


def _columns(inches: float) -> int:
    """Return the number of characters per line."""
    return max(8, int(inches * 72 / (_SIZE * _ADVANCE)))


def _places(pieces: list[str], columns: int) -> Iterator[tuple[int, int]]:
    """Yield the line and column of every token."""
    line = column = 0
    for piece in pieces:
        cells = min(_cells(_visible(piece)), columns)
        if column + cells > columns:
            line, column = line + 1, 0
        yield line, column
        column += cells
        if "\n" in piece:
            line, column = line + 1, 0


def _visible(piece: str) -> str:
    """Return a token's text on one line, with signs for invisible characters and a middle dot for an empty token."""
    signs = {"\n": "⏎", "\t": "→", "\r": "␍", "⟨": "‹", "⟩": "›"}
    shown = "".join(signs.get(c, c if c.isprintable() else "□") for c in piece)
    return shown or "·"


def _cells(shown: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)


def _token(ax: Axes, column: int, line: int, shown: str, choices: list[tuple[int, str]]) -> None:
    cells = _cells(shown)
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
    for _, other in others[:1]:  # more would overlap the number
        ax.add_patch(Rectangle((left, line + 0.645), width, 0.04, facecolor=other, linewidth=0))
    digits = len(str(first))
    if digits * SMALLEST * 0.64 + (digits > 1) * 2 > cells * _SIZE * _ADVANCE * 1.1:
        return  # the number would touch that of the next token, and the two would read as one
    ax.text(
        column + cells / 2,
        line + 0.96,
        str(first),
        fontsize=SMALLEST,
        color=MUTED,
        ha="center",
        va="baseline",
        in_layout=False,
    )
