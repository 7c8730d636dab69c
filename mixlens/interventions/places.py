"""Where the tokens of a forward stand: in which sequence, at which position, and which are padding."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mixlens.errors import RecordingError
from mixlens.interventions.generation import Generation
from mixlens.interventions.masks import Seen, seen_by_columns


@dataclass(eq=False)
class Batch:
    """Rows of one key-value cache, or of one forward without a cache.

    columns   how far the cache had grown after the last forward, padding and what came before included
    position  int64 [rows], the place of each row's next token; -1 before its first, as are
    sequence  int64 [rows], the sequence that each row continues,
    place     int64 [rows], the position id of each row's last token, and
    began     int64 [rows], the column of the cache in which the sequence begins
    valid     what the columns held, [rows, columns] of every forward, False for padding
    waiting   logits after each row's last token, until the next token is known
    """

    rows: int
    columns: int = 0
    position: np.ndarray = field(init=False)
    sequence: np.ndarray = field(init=False)
    place: np.ndarray = field(init=False)
    began: np.ndarray = field(init=False)
    valid: list[np.ndarray] = field(default_factory=list)
    waiting: torch.Tensor | None = None
    failed: bool = False

    def __post_init__(self) -> None:
        self.position, self.sequence, self.place, self.began = np.full((4, self.rows), -1)


@dataclass(eq=False)
class Call:
    """One forward; `raw`, `packed`, `hidden`, `head_input`, `logits` and `placed` are for whoever follows.

    start      columns in the cache before this forward
    step       number, among the columns a generate has sampled, of this forward's first; None for a prompt
    positions  position ids [rows or 1, columns], if they were given
    seen       what a four-dimensional mask says,
    masked_by_caller  and whether it was given, rather than made from position ids
    isolated   whether attention itself keeps apart what position ids begin anew, or what begins at
    seams      these columns
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
    seen: Seen | None = None
    isolated: bool = False
    masked_by_caller: bool = False
    seams: torch.Tensor | None = None
    begun: bool = False
    raw: Any = None
    packed: bool = False
    hidden: torch.Tensor | None = None
    head_input: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    placed: Placed | None = None

    @property
    def told(self) -> bool:
        """Whether a mask says what is padding."""
        return self.mask is not None or self.seen is not None


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
        at = call.start + np.arange(columns)
        seen = Seen(*(np.broadcast_to(part, (rows, columns)) for part in _seen(call, at)))
        valid = seen.own.astype(bool)
        generated = np.full(columns, call.step is not None)
        if call.generation is None and call.start > 0 and columns == 1:
            generated[:] = True  # somebody's own loop
        if call.step is not None and call.generation is not None:
            valid &= ~call.generation.padding(call.step, ids)
        self._begin(batch, seen, valid)
        opening = self._openings(call, seen, valid, at)
        sequence, position, began = self._number(batch, valid, opening, at)
        as_recorded = (seen.first == began) & (seen.last == at) & (seen.count == position + 1)
        if not call.isolated and not as_recorded[valid].all():
            raise self.refusal(
                "a forward in which tokens do not attend to exactly the tokens before them in their document, and to "
                "themselves. Pass a mask that is causal in every document and leaves out the same columns each time",
                "attention_mask",
            )
        batch.valid.append(valid)
        return Placed(batch, ids, valid, position, sequence, generated, rows == 1 or call.told)

    def _begin(self, batch: Batch, seen: Seen, valid: np.ndarray) -> None:
        """Rows whose first token this is: what they attend to before it was read before anybody followed."""
        if not batch.valid:
            batch.sequence = self.n_sequences + np.arange(batch.rows)
        row = np.flatnonzero((batch.position < 0) & valid.any(1))
        column = valid[row].argmax(1)
        batch.position[row] = seen.count[row, column] - 1
        batch.began[row] = seen.first[row, column]

    def _openings(self, call: Call, seen: Seen, valid: np.ndarray, at: np.ndarray) -> np.ndarray:
        """bool [rows, columns], where a further sequence begins inside a row."""
        apart = valid & (seen.first == at) & (at > call.batch.began[:, None])
        places = np.broadcast_to(at if call.positions is None else call.positions.cpu().numpy(), valid.shape)
        again = np.zeros_like(valid)
        for row in range(len(places)):
            column = np.flatnonzero(valid[row])
            if len(column):
                again[row, column[1:]] = self._check_positions(call, row, places[row, column], column[0], apart)
        if call.isolated:
            if call.seams is not None and not np.array_equal(np.flatnonzero(again), call.seams.cpu().numpy()[1:-1]):
                raise self.refusal(
                    "a row of documents whose position_ids start again elsewhere than cu_seq_lens_q says. Pass those "
                    "of one collator",
                    "position_ids",
                )
            return again
        if (again & ~apart).any():
            raise self.refusal(
                "a row in which position_ids start again while attention reaches over the seam: the documents in it "
                "see one another. Pass use_cache=False and no attention mask, so that transformers keeps them apart",
                "position_ids",
            )
        starts = valid & (seen.first == at)
        alone = starts & np.append(starts[:, 1:] | ~valid[:, 1:], np.ones((len(valid), 1), bool), 1)
        if call.masked_by_caller and alone[apart.any(1)].any():
            raise self.refusal(
                "a mask under which a token attends to itself alone, and none attends to it: a document of one token, "
                "or padding. Let padding attend to nothing, and leave out such documents",
                "attention_mask",
            )
        return apart

    def _check_positions(self, call: Call, row: int, own: np.ndarray, first: int, apart: np.ndarray) -> np.ndarray:
        """bool [n - 1], where the position ids of a row's n tokens start again."""
        batch = call.batch
        if batch.place[row] >= 0 and not apart[row, first]:
            begins = own[0] == batch.place[row] + 1
        else:
            begins = own[0] in (batch.position[row], call.start + first, 0 if not call.start else -1)
        on = np.diff(own) == 1
        again = (own[1:] == 0) & ~on
        if not begins or not (on | again).all():
            raise self.refusal(
                f"position_ids that neither the cache nor the tokens before explain, in row {row}. Continuous "
                "batching reads tokens in this way; generate one batch at a time instead",
                "position_ids",
            )
        batch.place[row] = own[-1]
        return again

    def _number(
        self, batch: Batch, valid: np.ndarray, opening: np.ndarray, at: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sequence, position, column in which the sequence began), all [rows, columns]; moves the batch on."""
        further = opening.sum(1)
        earlier = further.cumsum() - further  # in the rows above
        if not batch.valid:
            batch.sequence = batch.sequence + earlier
            following, self.n_sequences = batch.sequence, self.n_sequences + batch.rows
        else:
            following = self.n_sequences + earlier - 1
        self.n_sequences += int(further.sum())
        segment, counted = opening.cumsum(1), valid.cumsum(1)
        before = np.maximum.accumulate(np.where(opening, counted - 1, 0), 1)
        sequence = np.where(segment, following[:, None] + segment, batch.sequence[:, None])
        position = counted - 1 + np.where(segment, -before, batch.position[:, None])
        began = np.where(segment, np.maximum.accumulate(np.where(opening, at, -1), 1), batch.began[:, None])
        if valid.shape[1]:
            heard = valid.any(1)
            batch.sequence, batch.began = sequence[:, -1], began[:, -1]
            batch.position = np.where(heard, position[:, -1] + 1, batch.position)
        return sequence, position, began

    def refusal(self, what: str, value: object, found: object = None) -> RecordingError:
        argument, value = (value, found) if found is not None else (value, value)
        return RecordingError(f"{self.who} cannot follow {what}.", argument=str(argument), value=value)


def _seen(call: Call, at: np.ndarray) -> Seen:
    """What the columns `at` of the cache attend to, by the mask of a forward."""
    if call.mask is not None:
        seen = seen_by_columns(call.mask.cpu(), call.start, call.shape[1])
    elif call.seen is not None:
        seen = call.seen
    else:
        return Seen(np.array(True), np.array(0), at, at + 1)
    return Seen(*(part.cpu().numpy() for part in seen))
