"""What decisions share: the documents that judge, the verdict of a gain, variables with bounds, checks of arguments."""

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

# A decision is acted upon, so that its intervals miss the truth in 1 of 100 cases and not in 5.
DECISION = Bootstrap(level=0.99)
_BOUNDS = ("ci_low", "ci_high")


def judged(gain: Quantity, sizes: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """The attributes verdict, gain, gain_low, gain_high and gain_interval of a gain without dimensions.

    sizes  [unit] how much each document has to say
    """
    estimate, low, high = (float(value) for value in with_bounds(gain, sizes, bootstrap.level))
    numbers = {"gain": estimate, "gain_low": low, "gain_high": high}
    return {"verdict": verdict(low, high), **numbers, "gain_interval": said(gain)}


def bounded(
    name: str, dims: tuple[str, ...], quantity: Quantity, sizes: np.ndarray, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Variables of a Dataset: a quantity and its bounds, name_low and name_high, or those of an estimate."""
    names = (name, *(_BOUNDS if name == "estimate" else (f"{name}_low", f"{name}_high")))
    found = with_bounds(quantity, sizes, bootstrap.level)
    return {own: (dims[: values.ndim], values) for own, values in zip(names, found, strict=True)}


@contextmanager
def groups_compared() -> Iterator[None]:
    """Recordings within do not remark that documents have a column in common: its groups are compared by design."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Several documents have the same", UserWarning)
        yield


def check_positive(what: str, **numbers: float | None) -> None:
    """Raises BadInput for a number that is not above 0; None is none."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise BadInput(
                f"Cannot compute {what} with {name}={value!r}: it is no number above 0. Pass one.",
                argument=name,
                value=value,
            )


def check_whole(what: str, least: int = 1, **numbers: int) -> None:
    """Raises BadInput for a number that is not whole, or below the least."""
    for name, value in numbers.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise BadInput(
                f"Cannot compute {what} with {name}={value!r}: it is no whole number from {least}. Pass one.",
                argument=name,
                value=value,
            )


def check_found(found: Any, statistic: str, argument: str = "found") -> None:
    """Raises BadInput for anything else than what a function of this package returned."""
    if not isinstance(found, xr.Dataset) or found.attrs.get("statistic") != statistic:
        raise BadInput(
            f"Cannot use a {type(found).__name__} as what {statistic} returns. Pass that.",
            argument=argument,
            value=type(found).__name__,
        )


@dataclass(frozen=True)
class Documents:
    """The sequences of a trace, the documents (or clusters) that they belong to, and the half that judges.

    first    [token] place of the first token of its sequence
    starts   [sequence] its first token
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
                "Cannot decide anything from a trace without tokens. Select fewer conditions, or record documents.",
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
        """[document]"""
        return self.sum(np.ones((1, len(self.first))))[:, 0]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Numbers [..., token] added up in each document [document, ...]."""
        out = np.zeros((len(self.judging), *values.shape[:-1]))
        np.add.at(out, self.unit, np.moveaxis(np.add.reduceat(values, self.starts, axis=-1, dtype=np.float64), -1, 0))
        return out

    @property
    def of_token(self) -> np.ndarray:
        """[token] its document"""
        return self.unit[np.searchsorted(self.starts, self.first)]
