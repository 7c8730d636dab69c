"""Live views of two recordings of the same tokens side by side, and of a strip of tokens across all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixlens.errors import BadInput
from mixlens.live.payload import pack, token_arrays
from mixlens.live.tokens import domain, first_tokens, label
from mixlens.live.view import View, static_form, static_table
from mixlens.plot import labels, lines, text
from mixlens.plot.colours import expert_colours
from mixlens.stats import agreement
from mixlens.trace.trace import Trace

_MOST_STRIP = 40


def strip(trace: Trace, sequence: int | None = None, *, start: int = 0, count: int = _MOST_STRIP) -> View:
    """Show up to 40 tokens of a sequence across and layers down, each cell with the expert of the first choice.

    Parameters
    ----------
    trace : Trace
        Needs ``expert_id``.
    sequence : int, optional
        Sequence number. By default the first sequence.
    start : int, optional
        Position of the first token.
    count : int, optional
        Number of tokens, at most 40.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If the trace does not have the sequence, or the range has no token.

    Examples
    --------
    >>> ml.view.strip(trace, 0, start=8, count=16)
    View: Strip of sequence 0, wikipedia (document wikipedia-1)
    """
    number = text.sequence_number(trace, sequence)
    stop = start + min(count, _MOST_STRIP)
    part = trace.select(where=trace.sequences.index.to_series() == number, positions=(start, stop))
    if not part.n_tokens:
        raise BadInput(
            f"Cannot show a strip of sequence {number} from position {start}: the sequence has "
            f"{trace.sequences['length'].loc[number]} tokens. Pass a smaller start=.",
            argument="start",
            value=start,
        )
    header, arrays = token_arrays(part, [number])
    header |= {"title": "Experts of every token and layer", "colours": expert_colours(trace.n_experts)}
    header["labels"] = [label(trace, number)]
    layer = text.layer_number(trace, None)
    caption = (
        f"Experts of {part.n_tokens} tokens of {label(trace, number)} in {trace.n_layers} layers of "
        f"{labels.model_name(trace)}; picture and table: layer {layer}."
    )
    one = part.select(layers=[layer])
    drawn = text.text(part, sequence=number, layer=layer)
    static = static_form(drawn, caption, static_table(first_tokens(one, one.read("expert_id")[:, 0]), "First tokens"))
    return View(f"Strip of {label(trace, number)}", "strip", static, pack(header, arrays))


def diff(
    a: Trace,
    b: Trace,
    sequence: int | Sequence[int] | None = None,
    *,
    layer: int | None = None,
    names: tuple[str, str] = ("first run", "second run"),
) -> View:
    """Show two recordings of the same tokens side by side, under one cursor, with differences outlined.

    Entropies are left out, so that two runs of 10,000 tokens in 32 layers fit into 1 MB.

    Parameters
    ----------
    a, b : Trace
        Recordings of the same tokens, with the same layers and experts.
    sequence : int or sequence of int, optional
        Sequence number or numbers. By default the first sequence.
    layer : int, optional
        Layer number to start at. By default the middle layer.
    names : tuple of str, optional
        Names of the two runs, which differ and contain no slash.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If the runs are not of the same tokens, layers and experts, do not have a sequence or the layer, or `names` are
        equal or contain a slash.

    Examples
    --------
    >>> ml.view.diff(trace, trace, names=("before", "after"))
    View: before and after
    """
    given = agreement(a, b)
    wanted = list(sequence) if isinstance(sequence, Sequence | np.ndarray) else [sequence]
    numbers = sorted({text.sequence_number(a, n) for n in wanted})
    number = text.layer_number(a, layer)
    if names[0] == names[1] or any("/" in name for name in names):
        raise BadInput(
            f"Cannot name two runs {names}: names must differ and contain no slash. Pass two others as names=.",
            argument="names",
            value=names,
        )
    header, arrays = _two_runs(names, token_arrays(a, numbers), token_arrays(b, numbers))
    arrays = {key: plane for key, plane in arrays.items() if not key.endswith("/entropy")}
    header |= {
        "title": f"{names[0]} and {names[1]}, token by token",
        "colours": expert_colours(a.n_experts),
        "labels": [label(a, n) for n in numbers],
        "domains": [domain(a, n) for n in numbers],
        "layer": int(np.flatnonzero(a.layers == number)[0]),
    }
    title = f"{names[0]} and {names[1]}"
    same = given.sel(measure=["top1", "overlap"])
    caption = f"How far {names[0]} and {names[1]} route the same tokens alike, by layer. {labels.sample(given)}."
    return View(title, "diff", static_form(lines.by_layer(same), caption, _agreement_table(same)), pack(header, arrays))


def _two_runs(
    names: tuple[str, str], a: tuple[dict[str, Any], dict[str, Any]], b: tuple[dict[str, Any], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header, and arrays "name/array", of two runs.

    Arrays that both runs have are stored as differences for the second run, because these compress well.
    """
    own = {key: value for key, value in b[0].items() if value != a[0].get(key)}
    first = a[1]
    second = {
        key: plane - first[key] if key in first and _alike(plane, first[key]) else plane for key, plane in b[1].items()
    }
    arrays = {f"{name}/{key}": p for name, run in zip(names, (first, second), strict=True) for key, p in run.items()}
    return {**a[0], "runs": list(names), "of": {names[0]: {}, names[1]: own}}, arrays


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.size == b.size


def _agreement_table(data: Any) -> str:
    columns = {"layer": [str(layer) for layer in data["layer"].to_numpy()]}
    for measure in data["measure"].to_numpy():
        part = data.sel(measure=measure)
        columns[labels.label(measure)] = [labels.with_interval(part.sel(layer=layer)) for layer in data["layer"]]
    return static_table(columns, "Agreement by layer")
