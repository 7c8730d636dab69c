"""Decoding steps: windows of tokens read together, and the experts that batches of them use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mixlens.core.intervals import leaving_out
from mixlens.errors import BadInput

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


@dataclass(frozen=True)
class Steps:
    """Windows of a trace, by the step at which a batch of its sequences reads them.

    kept     [token of the trace] mask of tokens in a window of a step with a full batch
    window   [kept token] its window
    step     [window]
    unit     [window] document, or another independent unit
    sizes    [unit] number of windows
    batch    sequences per step
    """

    kept: np.ndarray
    window: np.ndarray
    step: np.ndarray
    unit: np.ndarray
    sizes: np.ndarray
    batch: int

    @classmethod
    def of(cls, trace: Trace, batch: int, window: int) -> Steps:
        sequence, position = trace.read("sequence"), trace.read("position")
        starts = np.ones(len(sequence), bool)
        starts[1:] = (np.diff(sequence) != 0) | (np.diff(position) != 1)
        first, run = np.flatnonzero(starts), np.cumsum(starts) - 1
        offset = np.arange(len(sequence)) - first[run]
        kept = offset < np.bincount(run)[run] // window * window
        opens = offset[kept] % window == 0
        of_window = sequence[kept][opens]
        step = np.arange(len(of_window)) - np.searchsorted(of_window, of_window)
        rows = np.bincount(step)
        filled = (rows >= batch)[step]
        if not filled.any():
            raise BadInput(
                f"Cannot count the experts of batches of {batch} sequences with {window} consecutive tokens each: the "
                f"trace has at most {rows.max(initial=0)} such windows at one step. Pass a smaller batch or window, or "
                "record more and longer documents.",
                argument="batch",
                value=batch,
            )
        number = np.cumsum(opens) - 1
        kept[kept] = filled[number]
        unit, _ = pd.factorize(trace.sequences[trace.cluster].loc[of_window[filled]])
        renumbered = (np.cumsum(filled) - 1)[number[filled[number]]]
        return cls(kept, renumbered, step[filled], unit, np.bincount(unit).astype(float), batch)

    def read(self, ids: np.ndarray, n_experts: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return distinct experts of a step, and of `n` random tokens, over all units and without each [1 + unit].

        ids  [kept token, slot] of one layer
        """
        reads = np.zeros((len(self.step), n_experts), bool)
        reads[self.window[:, None], ids] = True
        pair, of_window = np.unique(self.unit * (self.step.max() + 1) + self.step, return_inverse=True)
        unit, step = np.divmod(pair, self.step.max() + 1)
        own = np.zeros((len(pair), n_experts), np.int64)
        np.add.at(own, of_window, reads)
        own_rows = np.bincount(of_window)
        readers = np.zeros((self.step.max() + 1, n_experts), np.int64)
        np.add.at(readers, step, own)
        rows = np.bincount(self.step)
        # Leaving out a unit changes only the steps that it reaches.
        whole = self._of_step(rows, readers)
        without = self._of_step(rows[step] - own_rows, readers[step] - own)
        less, fewer = (np.bincount(unit, before[step] - after) for before, after in zip(whole, without, strict=True))
        total, weight = (part.sum() for part in whole)
        with np.errstate(divide="ignore", invalid="ignore"):  # no batch exists without an indispensable unit
            read = np.append(total, total - less) / np.append(weight, weight - fewer)
        chosen = np.zeros((len(self.sizes), n_experts))
        of_token = self.unit[self.window]
        np.add.at(chosen, (of_token[:, None], ids), 1.0)
        with np.errstate(invalid="ignore"):
            share = leaving_out(chosen) / leaving_out(np.bincount(of_token))
        return read, (1 - (1 - share) ** n).sum(0)

    def _of_step(self, rows: np.ndarray, readers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return distinct experts summed over all batches of a step, and the number of batches, relative to all."""
        number = np.arange(int(np.bincount(self.step).max()) + 1)
        with np.errstate(divide="ignore"):
            ways = np.sum([np.log(np.maximum(number - i, 0)) for i in range(self.batch)], axis=0)
        with np.errstate(invalid="ignore"):
            batches = np.exp(ways[rows] - ways[-1])
            missed = np.exp(ways[rows[:, None] - readers] - ways[-1])
        return (batches[:, None] - missed).sum(-1), batches
