"""Verdicts: do it, do not, or not enough evidence, from the interval of a gain on documents nothing was fitted on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Quantity, said, with_bounds
from mixlens.errors import BadInput

DO, DO_NOT, UNKNOWN = "do it", "do not", "not enough evidence"
# A decision is acted upon, so that its intervals miss the truth in 1 of 100 cases and not in 5.
DECISION = Bootstrap(level=0.99)


def check_positive(what: str, **numbers: float | None) -> None:
    """Raises BadInput for a number that is not above 0; None is none."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise BadInput(
                f"Cannot compute {what} with {name}={value!r}: it is no number above 0. Pass one.",
                argument=name,
                value=value,
            )


def verdict(low: float, high: float, *, needed: float = 0.0) -> str:
    """Return "do it" where the whole interval of a gain lies above what is needed, "do not" where it lies below.

    Parameters
    ----------
    low, high : float
        Bounds of the gain; NaN where there are too few documents for an interval.
    needed : float, optional
        The gain from which it is worth it.

    Examples
    --------
    >>> from mixlens.decisions.verdict import verdict
    >>> verdict(0.02, 0.05), verdict(-0.01, 0.03), verdict(-0.03, -0.01)
    ('do it', 'not enough evidence', 'do not')
    """
    return DO if low > needed else DO_NOT if high < needed else UNKNOWN


def fewest_units(level: float) -> int:
    """Return the fewest documents of which an interval of this level may be taken for evidence.

    Of n documents whose differences are as often above zero as below, all lie on one side with probability 2^(1 - n).
    """
    return math.ceil(1 - math.log2(1 - level))


def judged(gain: Quantity, sizes: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """The attributes verdict, gain, gain_low, gain_high and gain_interval of a gain without dimensions.

    sizes  [unit] how much each document has to say
    """
    estimate, low, high = (float(value) for value in with_bounds(gain, sizes, bootstrap.level))
    return {
        "verdict": verdict(low, high),
        "gain": estimate,
        "gain_low": low,
        "gain_high": high,
        "gain_interval": said(gain),
    }
