"""The live view of tokens: the text with its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mixlens.errors import BadInput
from mixlens.live.payload import pack, signed_plane, token_arrays
from mixlens.live.view import View, static_form, static_table
from mixlens.plot import labels, text
from mixlens.plot.colours import expert_colours
from mixlens.trace.trace import Trace

_ROWS = 8  # of the table in the static form


def tokens(
    trace: Trace,
    sequence: int | Sequence[int] | None = None,
    *,
    layer: int | None = None,
    contributions: xr.Dataset | None = None,
) -> View:
    """Show the text of sequences, each token underlined by its experts, with a layer slider and a readout.

    Weights and log-probabilities are kept in hundredths, as they are shown; entropies are accurate to 1.7 % of
    log2(experts), contributions to 0.4 % of the scale's end.

    Parameters
    ----------
    trace : Trace
        Needs ``expert_id``; further signals appear in the readout.
    sequence : int or sequence of int, optional
        Sequence number or numbers from ``trace.sequences.index``. By default the first sequence.
    layer : int, optional
        Layer number to start at. By default the middle layer.
    contributions : xarray.Dataset, optional
        From `experiments.measure_contributions` over the same documents. The text can then be coloured by the size of
        the experts' outputs, and by what they add to the logit of the next token.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If the trace does not have a sequence or the layer, or the contributions are of other tokens.

    Examples
    --------
    >>> ml.view.tokens(trace, [0, 1], layer=3)
    View: Routing of sequence 0, wikipedia (document wikipedia-1) and 1 more
    """
    wanted = list(sequence) if isinstance(sequence, Sequence | np.ndarray) else [sequence]
    numbers = sorted({text.sequence_number(trace, n) for n in wanted or [None]})
    number = text.layer_number(trace, layer)
    title = f"Routing of {label(trace, numbers[0])}" + (f" and {len(numbers) - 1} more" if numbers[1:] else "")
    packed = packed_tokens(trace, numbers, number, contributions)
    return View(title, "tokens", _static(trace, numbers[0], number), packed)


def packed_tokens(trace: Trace, numbers: list[int], layer: int, contributions: xr.Dataset | None = None) -> str:
    """Return the data of the live token view of sequences `numbers`, without its static form."""
    header, arrays = token_arrays(trace, numbers)
    if contributions is not None:
        header["steps"] = {}
        for name, values in _matched(trace, numbers, contributions).items():
            header["steps"][name], arrays[name] = signed_plane(values)
    header |= {
        "title": ". ".join(["Experts of every token", *([header["left_out"]] if "left_out" in header else [])]),
        "colours": expert_colours(trace.n_experts),
        "labels": [label(trace, n) for n in numbers],
        "domains": [domain(trace, n) for n in numbers],
        "layer": int(np.flatnonzero(trace.layers == layer)[0]),
    }
    return pack(header, arrays)


def label(trace: Trace, number: int) -> str:
    """Name a sequence by its number, its domain if it has one, and its document."""
    row = trace.sequences.loc[number]
    domain = f", {row['domain']}" if "domain" in row else ""
    return f"sequence {number}{domain} (document {row['document_id']})"


def domain(trace: Trace, number: int) -> str | None:
    return str(trace.sequences.loc[number, "domain"]) if "domain" in trace.sequences else None


def _matched(trace: Trace, numbers: list[int], data: xr.Dataset) -> dict[str, np.ndarray]:
    """Return logit and norm [token, layer, slot] of the trace's tokens, matched by sequence and position."""
    part = trace.select(where=trace.sequences.index.to_series().isin(numbers))
    known = {
        key: i for i, key in enumerate(zip(data.sequence.values.tolist(), data.position.values.tolist(), strict=True))
    }
    asked = list(zip(part.read("sequence").tolist(), part.read("position").tolist(), strict=True))
    rows = np.array([known.get(key, -1) for key in asked], np.int64)
    data = data.sel(layer=trace.layers)
    same = (rows >= 0).all() and np.array_equal(data.expert_id.to_numpy()[rows], part.read("expert_id"))
    if not same:
        missing = int((rows < 0).sum())
        found = f"they lack {missing:,} of {len(rows):,} tokens" if missing else "their expert ids differ"
        raise BadInput(
            f"Cannot show contributions along sequence {numbers[0]}: {found}. Call measure_contributions with the "
            "documents and settings of the recording.",
            argument="contributions",
            value=(missing, len(rows)) if missing else "expert_id",
        )
    return {name: data[name].to_numpy()[rows] for name in ("norm", "logit")}


def _static(trace: Trace, number: int, layer: int) -> str:
    """Return picture, caption and table of the first tokens."""
    drawn = text.text(trace, sequence=number, layer=layer)
    one = trace.select(where=trace.sequences.index.to_series() == number, layers=[layer])
    ids = one.read("expert_id")[:, 0]
    counts = np.bincount(ids[:, 0], minlength=trace.n_experts)
    most = ", ".join(f"expert {e} for {counts[e]}" for e in np.argsort(-counts, kind="stable")[:3])
    caption = (
        f"Text of {label(trace, number)} at layer {layer} of {labels.model_name(trace)}, "
        f"n = {len(ids):,} tokens. First choices: {most} tokens ..."
    )
    table = static_table(first_tokens(one, ids), f"First {min(_ROWS, len(ids))} of {len(ids):,} tokens")
    return static_form(drawn, caption, table)


def first_tokens(one: Trace, ids: np.ndarray) -> dict[str, Any]:
    """Return the columns of a table of the first tokens; `one` has one layer, and `ids` is [token, slot]."""
    columns = {"position": [str(p) for p in one.read("position")[:_ROWS]]}
    if "token_id" in one.signals:
        columns["token"] = [_short(piece) for piece in one.pieces(one.read("token_id")[:_ROWS])]
    columns["experts"] = [", ".join(map(str, chosen)) for chosen in ids[:_ROWS]]
    if "weight" in one.signals:
        columns["weights"] = [", ".join(f"{w:.2f}" for w in weights) for weights in one.read("weight")[:_ROWS, 0]]
    if "logprob" in one.signals:
        columns["log-probability (nat)"] = ["–" if np.isnan(p) else f"{p:.2f}" for p in one.read("logprob")[:_ROWS]]
    return columns


def _short(piece: str) -> str:
    shown = repr(piece)[1:-1]
    return shown if len(shown) <= 40 else f"{shown[:40]}… ({len(piece):,} characters)"
