"""Which rows a key-value cache holds, and whether they are still those that the last forward left in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixlens.errors import RecordingError
from mixlens.interventions.places import Batch


@dataclass(frozen=True)
class _Contents:
    """The keys and values of a cache, and how often they were written to: what is reordered or cropped has others."""

    tensors: list[weakref.ref[torch.Tensor]]
    writes: list[int]

    @classmethod
    def of(cls, cache: Any) -> _Contents | None:
        parts = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
        found = [part for part in parts if isinstance(part, torch.Tensor)]
        if not found:
            return None
        # Tensors made in inference mode do not count what is written to them.
        writes = [0 if part.is_inference() else part._version for part in found]
        return cls([weakref.ref(part) for part in found], writes)

    def are_in(self, cache: Any) -> bool:
        found = _Contents.of(cache)
        return (
            found is not None
            and found.writes == self.writes
            and all(one() is other() for one, other in zip(found.tensors, self.tensors, strict=True))
        )


@dataclass
class _Held:
    cache: weakref.ref[Any]
    batch: Batch
    contents: _Contents | None = None


class Caches:
    """The rows of every cache that forwards have read, for as long as the cache lives."""

    def __init__(self, refusal: Callable[..., RecordingError]) -> None:
        self._refusal = refusal
        self._held: dict[int, _Held] = {}  # by the id of a cache, which need not hash

    def clear(self) -> None:
        self._held.clear()

    def note(self, cache: Any, batch: Batch, *, read: bool = False) -> None:
        """`batch` is what this cache holds; `read`: with the keys and values that a forward has left in it."""
        number = id(cache)
        held = self._held.get(number)
        if held is None or held.batch is not batch:
            try:
                held = _Held(weakref.ref(cache, lambda _: self._held.pop(number, None)), batch)
            except TypeError:
                raise self._refusal(
                    f"a cache of type {type(cache).__name__}, which takes no weak references. Derive it from "
                    "transformers.Cache, or add __weakref__ to its __slots__",
                    "past_key_values",
                    type(cache).__name__,
                ) from None
            self._held[number] = held
        if read:
            held.contents = _Contents.of(cache)

    def continued(self, cache: Any, rows: int, past: int, *, masked: bool) -> Batch | None:
        """The rows that a forward continues; None where it begins, or where what the cache holds was read elsewhere.

        masked  whether a mask says what of the cache is padding
        """
        held = self._held.get(id(cache))
        if held is None or past == 0:
            return None
        batch = held.batch
        if rows != batch.rows:  # rows were repeated or picked
            if not masked and not all(part.all() for part in batch.valid):
                raise self._refusal(
                    f"a cache of {batch.rows} rows that now holds {rows}, without the mask of the padding in it. Pass "
                    "attention_mask=",
                    "attention_mask",
                    rows,
                )
            return None
        if batch.failed:
            raise self._refusal(
                "a cache after a forward that failed: part of its layers have read more than others. Start a new cache",
                "past_key_values",
            )
        if past < batch.columns and not any(
            part[:, max(0, len(part[0]) - back) :].any() for part, back in _removed(batch, past)
        ):
            batch.columns = past  # nothing but padding was taken back
            return batch
        if past != batch.columns or (held.contents is not None and not held.contents.are_in(cache)):
            raise self._refusal(
                f"a cache of {batch.columns} tokens that now holds {past}, or other rows: tokens were taken back, "
                "added or reordered outside. Start a new cache, or record the two parts separately",
                "past_key_values",
                past,
            )
        return batch


def _removed(batch: Batch, past: int) -> Iterator[tuple[np.ndarray, int]]:
    """The parts of what a batch has read that reach beyond `past`, each with how many of its columns do."""
    end = batch.columns
    for part in reversed(batch.valid):
        if end <= past:
            return
        yield part, min(part.shape[1], end - past)
        end -= part.shape[1]
