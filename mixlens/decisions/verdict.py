"""Shared parts of decisions: judging documents, the verdict of a gain, variables with bounds, argument checks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Quantity, said, with_bounds
from mixlens.errors import BadInput
from mixlens.stats.verdicts import verdict

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

# Decisions have consequences, so their intervals miss the truth in 1 of 100 cases instead of 5.
DECISION = Bootstrap(level=0.99)
_BOUNDS = ("ci_low", "ci_high")


def judged(gain: Quantity, sizes: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return the attributes verdict, gain, gain_low, gain_high and gain_interval of a gain without dimensions.

    sizes  [unit] weight of each document
    """
    estimate, low, high = (float(value) for value in with_bounds(gain, sizes, bootstrap.level))
    numbers = {"gain": estimate, "gain_low": low, "gain_high": high}
    return {"verdict": verdict(low, high), **numbers, "gain_interval": said(gain)}


def bounded(
    name: str, dims: tuple[str, ...], quantity: Quantity, sizes: np.ndarray, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Return Dataset variables for a quantity and its bounds: name, name_low and name_high, or those of an estimate."""
    names = (name, *(_BOUNDS if name == "estimate" else (f"{name}_low", f"{name}_high")))
    found = with_bounds(quantity, sizes, bootstrap.level)
    return {own: (dims[: values.ndim], values) for own, values in zip(names, found, strict=True)}


@contextmanager
def groups_compared() -> Iterator[None]:
    """Suppress the remark that documents share a column, since its groups are compared by design."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Several documents have the same", UserWarning)
        yield


def check_positive(what: str, **numbers: float | None) -> None:
    """Raise BadInput for a number that is not above 0; None is allowed."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise BadInput(
                f"Cannot compute {what} with {name}={value!r}: it is not a number above 0. Pass one.",
                argument=name,
                value=value,
            )


def check_whole(what: str, least: int = 1, **numbers: int) -> None:
    """Raise BadInput for a number that is not an integer, or below `least`."""
    for name, value in numbers.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise BadInput(
                f"Cannot compute {what} with {name}={value!r}: it is not an integer from {least}. Pass one.",
                argument=name,
                value=value,
            )


def check_found(found: Any, statistic: str, argument: str = "found") -> None:
    """Raise BadInput for anything other than the result of `statistic`."""
    if not isinstance(found, xr.Dataset) or found.attrs.get("statistic") != statistic:
        raise BadInput(
            f"Cannot use a {type(found).__name__}: expected the result of {statistic}. Pass that.",
            argument=argument,
            value=type(found).__name__,
        )


@dataclass(frozen=True)
class Documents:
    """Sequences of a trace, their documents (or clusters), and the half that judges.

    first    [token] index of the first token of its sequence
    starts   [sequence] index of its first token
    unit     [sequence] document
    judging  [document] whether nothing is fitted on it
    """

    first: np.ndarray
    starts: np.ndarray
    unit: np.ndarray
    judging: np.ndarray

    @classmethod
    def of(cls, trace: Trace, bootstrap: Bootstrap) -> Documents:
        if not trace.n_tokens:
            raise BadInput(
                "Cannot decide from a trace without tokens. Select fewer conditions, or record documents.",
                argument="trace",
                value=0,
            )
        sequence = trace.read("sequence")
        first = np.searchsorted(sequence, sequence)
        starts = np.unique(first)
        unit, present = pd.factorize(trace.sequences[trace.cluster].loc[sequence[starts]])
        names = trace.sequences[trace.cluster].drop_duplicates().to_numpy()
        fitted = np.random.default_rng(bootstrap.seed).permutation(names)[: len(names) // 2]
        return cls(first, starts, unit, ~np.isin(present, fitted))

    @property
    def tokens(self) -> np.ndarray:
        """Number of tokens of each document [document]."""
        return self.sum(np.ones((1, len(self.first))))[:, 0]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum numbers [..., token] over each document [document, ...]."""
        out = np.zeros((len(self.judging), *values.shape[:-1]))
        np.add.at(out, self.unit, np.moveaxis(np.add.reduceat(values, self.starts, axis=-1, dtype=np.float64), -1, 0))
        return out

    @property
    def of_token(self) -> np.ndarray:
        """Document of each token [token]."""
        return self.unit[np.searchsorted(self.starts, self.first)]
