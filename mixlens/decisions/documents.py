"""Documents: sums over what varies independently, and which half of it judges what is fitted on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mixlens.core.bootstrap import Bootstrap
from mixlens.errors import BadInput

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


@dataclass(frozen=True)
class Documents:
    """Sequences and the documents (or clusters) that they belong to.

    starts   [sequence] its first token
    unit     [sequence]
    judging  [unit] whether nothing is fitted on it
    """

    starts: np.ndarray
    unit: np.ndarray
    judging: np.ndarray

    @classmethod
    def of(cls, trace: Trace, first: np.ndarray, sequence: np.ndarray, bootstrap: Bootstrap) -> Documents:
        if not len(first):
            raise BadInput(
                "Cannot decide anything from a trace without tokens. Select fewer conditions, or record documents.",
                argument="trace",
                value=0,
            )
        starts = np.unique(first)
        numbers = sequence[starts]
        unit, present = pd.factorize(trace.sequences[trace.cluster].loc[numbers])
        names = trace.sequences[trace.cluster].drop_duplicates().to_numpy()
        fitted = np.random.default_rng(bootstrap.seed).permutation(names)[: len(names) // 2]
        return cls(starts, unit, ~np.isin(present, fitted))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Numbers [..., token] added up in each unit [unit, ...]."""
        out = np.zeros((len(self.judging), *values.shape[:-1]))
        np.add.at(out, self.unit, np.moveaxis(np.add.reduceat(values, self.starts, axis=-1, dtype=np.float64), -1, 0))
        return out

    def of_token(self, first: np.ndarray) -> np.ndarray:
        return self.unit[np.searchsorted(self.starts, first)]
