"""Replay: the routing of a trace, put back onto the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mixlens.errors import BadInput
from mixlens.interventions.places import Placed
from mixlens.interventions.routing import Layers, Routing, Rows
from mixlens.interventions.where import EVERYWHERE, Where
from mixlens.trace.trace import Trace


@dataclass(frozen=True, eq=False)
class Replay:
    """The experts that a trace recorded for the same tokens, and its weights where they are asked for."""

    trace: Trace = field(repr=False)
    weights: bool
    layers: Layers
    where: Where = EVERYWHERE
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        names = ("sequence", "position", "token_id", "expert_id", *(["weight"] if self.weights else []))
        self.trace._require_signals("replay", *names)
        blocks = list(self.trace.blocks(*names))
        if not blocks:
            raise BadInput(
                "Cannot replay a trace without tokens. Pass one that has tokens.",
                argument="trace",
                value=0,
            )
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in names}
        n_tokens = len(columns["sequence"])
        starts = np.flatnonzero(np.diff(columns["sequence"], prepend=-1))
        whole = np.arange(n_tokens) - np.repeat(starts, np.diff(starts, append=n_tokens))
        if not np.array_equal(whole, columns["position"]):
            raise BadInput(
                "Cannot replay the trace: some of its sequences lack tokens, because it was selected by phase, token "
                "or position. Pass the whole trace, and select tokens with where=.",
                argument="trace",
            )
        object.__setattr__(self, "tokens", n_tokens)
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "_starts", np.append(starts, n_tokens))

    def locator(self) -> _Matcher:
        return _Matcher(self)

    def apply(self, routing: Routing, layer: int, rows: Rows, index: Any) -> None:
        assert rows is not None
        column = int(np.flatnonzero(self.trace.layers == layer)[0])
        slots = self.trace.layer_top_k[column]
        ids, weight = self._at("expert_id", index, column, slots, rows.device), None
        cells = torch.zeros_like(routing.banned).scatter(1, ids, True) & rows[:, None]
        if self.weights:
            weight = self._at("weight", index, column, slots, rows.device)
            weight = torch.full_like(routing.fixed, torch.nan).scatter(1, ids, weight)
        routing.force_only(cells, weight, rows)

    def _at(self, name: str, index: np.ndarray, column: int, slots: int, device: torch.device) -> torch.Tensor:
        values = self._columns[name][np.maximum(index, 0), column, :slots]  # type: ignore[attr-defined]
        return torch.from_numpy(values.astype(np.int64) if name == "expert_id" else values).to(device)


class _Matcher:
    """Finds for every row the recorded sequence that has its tokens, whatever the order of rows.

    A decode narrows the sequences that are possible with every token.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.starts: np.ndarray = replay._starts  # type: ignore[attr-defined]
        self.token_id: np.ndarray = replay._columns["token_id"]  # type: ignore[attr-defined]
        self.position: np.ndarray = replay._columns["position"]  # type: ignore[attr-defined]
        self._possible: dict[int, list[int]] = {}  # of each sequence that the model reads

    def locate(self, placed: Placed) -> tuple[np.ndarray, np.ndarray]:
        """(bool, index of the recorded token or -1), both [rows, columns]."""
        index = np.full(placed.ids.shape, -1)
        taken: set[int] = set()
        for number in np.unique(placed.sequence[placed.valid]).tolist():
            rows, columns = np.nonzero(placed.valid & (placed.sequence == number))
            row = int(rows[0])
            before = self._possible.get(number, range(len(self.starts) - 1))
            start, ids = int(placed.position[row, columns[0]]), placed.ids[row, columns]
            agreeing = [s for s in before if self._agrees(s, start, ids, placed.masked)]
            if not agreeing:
                raise self._mismatch(row, start, ids, before)
            if not placed.masked:  # what is not in the recorded sequence counts as padding: the longest explains most
                agreeing.sort(key=self._length, reverse=True)
            self._possible[number] = agreeing
            found = next((s for s in agreeing if s not in taken), agreeing[0])
            taken.add(found)
            n = min(len(columns), self._length(found) - start)
            index[row, columns[:n]] = self.starts[found] + start + np.arange(n)
        mask, _ = self.replay.where.locate(placed)
        return mask & (index >= 0), index

    def _length(self, sequence: int) -> int:
        return int(self.starts[sequence + 1] - self.starts[sequence])

    def _agrees(self, sequence: int, start: int, ids: np.ndarray, masked: bool) -> bool:
        """Whether a sequence has these tokens; where padding is unknown, whether it is what the row begins with."""
        n = self._length(sequence) - start
        if n <= 0 or (masked and n < len(ids)):
            return False
        first = self.starts[sequence] + start
        return np.array_equal(self.token_id[first : first + min(n, len(ids))], ids[:n])

    def _mismatch(self, row: int, start: int, ids: np.ndarray, before: Iterable[int]) -> BadInput:
        same, nearest = -1, 0
        for sequence in before:
            first = self.starts[sequence] + start
            n = max(0, min(self._length(sequence) - start, len(ids)))
            differ = np.flatnonzero(self.token_id[first : first + n] != ids[:n])
            agreed = int(differ[0]) if len(differ) else n
            if agreed > same:
                same, nearest = agreed, sequence
        number = self.replay.trace.sequences.index[nearest]
        place = start + same
        ends = place >= self._length(nearest)
        recorded = "ends there" if ends else f"has token {self.token_id[self.starts[nearest] + place]}"
        return BadInput(
            f"Cannot replay the routing on row {row}: it has token {ids[min(same, len(ids) - 1)]} at position "
            f"{place}, where the nearest recorded sequence, {number}, {recorded}. Run the model on the tokens that "
            "were recorded.",
            argument="row",
            value=(row, place),
        )


def possible_layers(trace: Trace, layers: Iterable[int] | None, known: list[int]) -> None:
    """Raises BadInput unless the trace has routing for the layers asked, or for all layers of the model."""
    wanted = known if layers is None else list(layers)
    missing = sorted(set(wanted) - set(trace.layers.tolist()))
    beyond = sorted(set(trace.layers.tolist()) - set(known)) if layers is None else []
    if missing or beyond:
        raise BadInput(
            f"Cannot replay the routing in layers {wanted}: the trace has layers {trace.layers.tolist()} and the "
            f"model has experts in {known}. Pass a trace of this model, or name the layers with layers=.",
            argument="layers",
            value=missing or beyond,
        )


def check_experts(trace: Trace, n_experts: int, top_k: dict[int, int], layers: Iterable[int]) -> None:
    """Raises BadInput unless the trace chose as many experts in these layers, among as many."""
    recorded = dict(zip(trace.layers.tolist(), trace.layer_top_k, strict=True))
    for layer in sorted(layers):
        if (trace.n_experts, recorded.get(layer)) != (n_experts, top_k[layer]):
            raise BadInput(
                f"Cannot replay the routing in layer {layer}: the trace has top-{recorded.get(layer)} of "
                f"{trace.n_experts} experts, the model top-{top_k[layer]} of {n_experts}. Pass a trace of this model.",
                argument="trace",
                value=(recorded.get(layer), trace.n_experts),
            )
