"""Where the tokens of a forward stand: in which sequence, at which position, and which are padding."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mixlens.errors import RecordingError
from mixlens.interventions.generation import Generation


@dataclass(eq=False)
class Batch:
    """Rows of one key-value cache, or of one forward without a cache.

    columns   how far the cache had grown after the last forward, padding and what came before included
    keys      the cache's first keys after the last forward: whoever reorders or crops a cache replaces them
    position  int64 [rows], the place of each row's next token
    sequence  int64 [rows], the sequence that each row continues; -1 before its first token
    place     int64 [rows], the position id of each row's last token; -1 where it is not known
    valid     what the columns held, [rows, columns] of every forward, False for padding
    waiting   logits after each row's last token, until the next token is known
    """

    rows: int
    columns: int = 0
    keys: weakref.ref[torch.Tensor] | None = None
    position: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sequence: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    place: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    valid: list[np.ndarray] = field(default_factory=list)
    waiting: torch.Tensor | None = None
    failed: bool = False


@dataclass(eq=False)
class Call:
    """One forward; `raw`, `packed`, `hidden`, `head_input`, `logits` and `placed` are for whoever follows.

    start      columns in the cache before this forward
    step       number, among the columns a generate has sampled, of this forward's first; None for a prompt
    positions  position ids [rows or 1, columns], if they were given
    attended   of a four-dimensional mask, what `attended` reads off it
    """

    batch: Batch
    ids: torch.Tensor | None
    mask: torch.Tensor | None
    shape: tuple[int, int]
    start: int
    going_on: bool
    generation: Generation | None = None
    step: int | None = None
    positions: torch.Tensor | None = None
    attended: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    isolated: bool = False
    begun: bool = False
    raw: Any = None
    packed: bool = False
    hidden: torch.Tensor | None = None
    head_input: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    placed: Placed | None = None


@dataclass(frozen=True)
class Placed:
    """The tokens of one forward. Arrays are [rows, columns] but for `generated` [columns].

    ids        -1 where the forward was given embeddings
    valid      False for padding
    position   place of the token in its own sequence, padding apart
    sequence   number of the token's sequence among all that were seen
    generated  True for tokens that the model sampled
    masked     whether the forward said what is padding; without that, all tokens are valid
    """

    batch: Batch
    ids: np.ndarray
    valid: np.ndarray
    position: np.ndarray
    sequence: np.ndarray
    generated: np.ndarray
    masked: bool


class Places:
    """Numbers the sequences that forwards read, from masks and position ids.

    who  how errors name the one who follows
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self.n_sequences = 0
        self._lock = threading.Lock()

    def place(self, call: Call) -> Placed:
        """Where the tokens of this call stand. Counts them, so it is asked once for every call, in order."""
        with self._lock:
            return self._place(call)

    def _place(self, call: Call) -> Placed:
        batch, (rows, columns) = call.batch, call.shape
        ids = np.full((rows, columns), -1) if call.ids is None else call.ids.cpu().numpy()
        valid = self._valid(call)
        generated = np.full(columns, call.step is not None)
        if call.generation is None and call.start > 0 and columns == 1:
            generated[:] = True  # somebody's own loop
        if call.step is not None and call.generation is not None:
            valid &= ~call.generation.padding(call.step, ids)
        self._check_history(call, valid)
        opening = self._openings(call, valid)
        sequence, position = self._number(batch, valid, opening)
        batch.valid.append(valid)
        return Placed(batch, ids, valid, position, sequence, generated, rows == 1 or self._told(call))

    def _told(self, call: Call) -> bool:
        return call.mask is not None or call.attended is not None

    def _valid(self, call: Call) -> np.ndarray:
        rows, columns = call.shape
        if call.attended is not None:
            own = call.attended[0].cpu().numpy()
            return np.array(np.broadcast_to(own, (rows, columns)))
        if call.mask is None:
            return np.ones((rows, columns), bool)
        own = call.mask if call.mask.shape[1] == columns else call.mask[:, call.start : call.start + columns]
        return own.cpu().numpy().astype(bool)

    def _check_history(self, call: Call, valid: np.ndarray) -> None:
        """Rows see of their past what was recorded of it, and a past that is not known is counted."""
        batch = call.batch
        before = None
        if call.start and call.mask is not None and call.mask.shape[1] >= call.start + call.shape[1]:
            before = call.mask[:, : call.start].cpu().numpy().astype(bool)
        unknown = batch.position < 0
        if unknown.any():
            counted = np.full(batch.rows, call.start) if before is None else before.sum(1)
            batch.position = np.where(unknown, counted, batch.position)
            return
        if (
            not batch.valid
            or call.step is not None
            or call.attended is not None
            or (before is None and call.start and call.mask is not None)
        ):
            return
        batch.valid = [np.concatenate(batch.valid, 1)]
        past = batch.valid[0]
        seen = np.ones_like(past) if before is None else before[:, call.start - past.shape[1] :]
        if not np.array_equal(past, seen[:, : past.shape[1]]):
            raise self.refusal(
                "a forward whose attention mask differs, in the columns read before, from the mask that they were read "
                "with. Pass the mask of all columns with every forward",
                "attention_mask",
            )

    def _openings(self, call: Call, valid: np.ndarray) -> np.ndarray | None:
        """bool [rows, columns], where a further sequence begins inside a row; None where none does."""
        apart = None
        if call.attended is not None:
            _, first, count = (part.cpu().numpy() for part in call.attended)
            rows, columns = call.shape
            first, count = (np.broadcast_to(part, (rows, columns)) for part in (first, count))
            at = call.start + np.arange(columns)
            apart = valid & (first == at)
            if not call.start:
                began = np.maximum.accumulate(np.where(apart, at, -1), 1)
                within = valid.cumsum(1) - np.take_along_axis(valid.cumsum(1), np.maximum(began, 0), 1) + 1
                if not np.array_equal(first[valid], began[valid]) or not np.array_equal(count[valid], within[valid]):
                    raise self.refusal(
                        "a forward whose attention mask is not causal within each document. Pass a mask under which "
                        "every token attends to all those before it in its document, and to itself",
                        "attention_mask",
                    )
        opening = self._check_positions(call, valid, apart)
        return opening if apart is None else apart

    def _check_positions(self, call: Call, valid: np.ndarray, apart: np.ndarray | None) -> np.ndarray | None:
        batch, columns = call.batch, call.shape[1]
        given = call.start + np.arange(columns) if call.positions is None else call.positions.cpu().numpy()
        places = np.broadcast_to(given, valid.shape)
        opening = np.zeros_like(valid)
        for row in range(len(places)):
            at = np.flatnonzero(valid[row])
            if not len(at):
                continue
            own = places[row, at]
            last = batch.place[row]
            if last >= 0 and not (apart is not None and apart[row, at[0]]):
                begins = own[0] == last + 1
            else:
                begins = own[0] in (batch.position[row], call.start + at[0], 0 if not call.start else -1)
            steps = np.diff(own) == 1
            again = (own[1:] == 0) & ~steps
            if not begins or not (steps | again).all():
                raise self.refusal(
                    f"position_ids that neither the cache nor the tokens before explain, in row {row}. Continuous "
                    "batching reads tokens in this way; generate one batch at a time instead",
                    "position_ids",
                )
            opening[row, at[1:][again]] = True
            batch.place[row] = own[-1]
        if not opening.any():
            return None
        if not call.isolated and (apart is None or not np.array_equal(opening, apart & (valid.cumsum(1) > 1))):
            raise self.refusal(
                "a row in which position_ids start again while attention reaches over the seam: the documents in it "
                "see one another. Pass use_cache=False and no attention mask, so that transformers keeps them apart",
                "position_ids",
            )
        return opening

    def _number(self, batch: Batch, valid: np.ndarray, opening: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(sequence, position), both [rows, columns]; moves the batch on."""
        rows, columns = valid.shape
        counted = valid.cumsum(1)
        new = not batch.valid
        within = None if opening is None else opening & ((counted > 1) | (batch.position > 0)[:, None])
        if within is None or not within.any():
            if new:
                batch.sequence = self.n_sequences + np.arange(rows)
                self.n_sequences += rows
            position = batch.position[:, None] + counted - 1
            batch.position = batch.position + counted[:, -1] if columns else batch.position
            return np.broadcast_to(batch.sequence[:, None], valid.shape), position
        sequence, position = np.zeros(valid.shape, np.int64), np.zeros(valid.shape, np.int64)
        for row in range(rows):
            starts = np.flatnonzero(within[row])
            if new:
                batch.sequence[row] = self.n_sequences
                self.n_sequences += 1
            numbers = np.append(batch.sequence[row], self.n_sequences + np.arange(len(starts)))
            self.n_sequences += len(starts)
            segment = np.searchsorted(starts, np.arange(columns), side="right")
            base = np.append(-batch.position[row], counted[row, starts] - 1)
            sequence[row], position[row] = numbers[segment], counted[row] - 1 - base[segment]
            batch.sequence[row], batch.position[row] = sequence[row, -1], position[row, -1] + 1
        return sequence, position

    def refusal(self, what: str, value: object, found: object = None) -> RecordingError:
        argument, value = (value, found) if found is not None else (value, value)
        return RecordingError(f"{self.who} cannot follow {what}.", argument=str(argument), value=value)


def attended(
    mask: torch.Tensor, past: int, columns: int, refusal: Callable[..., RecordingError]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a mask [rows, heads, columns, keys]: whether each column attends to itself, the first key that it attends to,
    and how many; all [rows, columns]."""
    known = mask.dtype == torch.bool or mask.is_floating_point()
    if mask.shape[-1] < past + columns or mask.shape[-2] != columns or not known:
        raise refusal(
            f"a forward of {columns} tokens after {past} in the cache with an attention mask of shape "
            f"{list(mask.shape)} and type {mask.dtype}. Pass a mask of all of them, boolean or of floats",
            "attention_mask",
        )
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    allowed = allowed[:, 0]
    at = torch.arange(columns, device=mask.device)
    return allowed[:, at, past + at], allowed.to(torch.uint8).argmax(-1), allowed.sum(-1)
