"""Selections of tokens and layers behind `Trace.select`, applied block by block."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from mixlens.errors import BadInput
from mixlens.trace import shards
from mixlens.trace.shards import Part


@dataclass(frozen=True)
class Source:
    """A part of a trace with its selection of tokens and layers."""

    part: Part
    offset: int = 0  # added to the part's own sequence numbers
    layer_index: tuple[int, ...] | None = None
    slots: int | None = None  # slots of the selected layers; None for all
    phase: int | None = None
    tokens: tuple[int, ...] | None = None
    positions: tuple[int, int] | None = None

    @property
    def whole(self) -> bool:
        return self.phase is None and self.tokens is None and self.positions is None

    def narrowed(self, phase: int | None, tokens: Sequence[int] | None, positions: tuple[int, int] | None) -> Source:
        """Return the source with further conditions; None means no condition."""
        seen = self
        if phase is not None:
            seen = replace(seen, phase=phase) if seen.phase in (None, phase) else replace(seen, tokens=())
        if tokens is not None:
            ids = {int(t) for t in tokens}
            seen = replace(seen, tokens=tuple(ids if seen.tokens is None else ids.intersection(seen.tokens)))
        if positions is not None:
            (first, stop), before = map(int, positions), seen.positions
            both = (first, stop) if before is None else (max(first, before[0]), min(stop, before[1]))
            seen = replace(seen, positions=both)
        return seen


def spans(sequence: np.ndarray, tokens: int) -> Iterator[tuple[int, int]]:
    """Yield slices of about `tokens` tokens that end at the end of a sequence."""
    ends = np.append(np.flatnonzero(np.diff(sequence)) + 1, len(sequence))
    start = 0
    while start < len(sequence):
        last_fitting = np.searchsorted(ends, start + tokens, side="right") - 1
        stop = int(ends[max(last_fitting, np.searchsorted(ends, start, side="right"))])
        yield start, stop
        start = stop


def keep_tokens(source: Source, sequence: np.ndarray, selected: np.ndarray, start: int, stop: int) -> np.ndarray | None:
    """Return a mask of the selected tokens of a span; None if all are selected."""
    number = sequence + source.offset
    chosen = selected[np.minimum(number, len(selected) - 1)] & (number < len(selected))
    met = conditions(source, start, stop)
    if met is None:
        return None if chosen.all() else chosen
    return chosen & met


def conditions(source: Source, start: int, stop: int) -> np.ndarray | None:
    if source.whole:
        return None
    keep = np.ones(stop - start, bool)
    if source.phase is not None:
        keep &= source.part.read("phase", start, stop) == source.phase
    if source.tokens is not None:
        keep &= np.isin(source.part.read("token_id", start, stop), source.tokens)
    if source.positions is not None:
        position = source.part.read("position", start, stop)
        keep &= (position >= source.positions[0]) & (position < source.positions[1])
    return keep


def column(source: Source, name: str, start: int, stop: int, keep: np.ndarray | None) -> np.ndarray:
    values = source.part.read(name, start, stop)
    values = values if keep is None else values[keep]
    if name in shards.ROUTING and source.layer_index is not None:
        values = values[:, list(source.layer_index)]
        values = values if name == "router_logits" else values[..., : source.slots]
    return values + source.offset if name == "sequence" else values


def row_mask(sequences: pd.DataFrame, where: Mapping[str, Any] | pd.Series, whole: pd.DataFrame) -> np.ndarray:
    """Return a mask of the selected sequences. A value must occur in `whole`, of which `sequences` may be a part."""
    if isinstance(where, pd.Series):
        if not pd.api.types.is_bool_dtype(where) or not sequences.index.isin(where.index).all():
            raise BadInput(
                "Cannot select sequences by this Series: it does not hold a boolean for every sequence. Make it from "
                'trace.sequences, as in trace.sequences["length"] > 100.',
                argument="where",
                value=str(where.dtype),
            )
        return where.reindex(sequences.index).fillna(False).to_numpy(bool)
    if not isinstance(where, Mapping):
        raise BadInput(
            f"Cannot select sequences by a {type(where).__name__}: it names no columns. Pass {{column: value}}, such "
            'as {"domain": "github"}, or a boolean Series over trace.sequences.',
            argument="where",
            value=type(where).__name__,
        )
    mask = np.ones(len(sequences), bool)
    for name, wanted in where.items():
        if name not in sequences:
            raise BadInput(
                f"Cannot select sequences by {name!r}: the columns are {', '.join(map(str, sequences.columns))}. Pass "
                "one of them.",
                argument="where",
                value=name,
            )
        values = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
        for value in values:
            if not whole[name].isin([value]).any():
                raise BadInput(
                    f"Cannot select sequences whose {name} is {value!r}: none has that value. "
                    f"{_known(whole[name], value)}",
                    argument="where",
                    value=value,
                )
        mask &= sequences[name].isin(values).to_numpy()
    return mask


def _known(column: pd.Series, asked: Any) -> str:
    """List the values of a column, closest match first; only some if there are many."""
    known = [str(value) for value in column.dropna().unique()]
    near = difflib.get_close_matches(str(asked), known, n=1)
    shown = ", ".join([*near, *(value for value in known if value not in near)][:8])
    return f"Pass one of {shown}{f' or {len(known) - 8:,} others' if len(known) > 8 else ''}."
