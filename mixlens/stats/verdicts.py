"""Verdicts from the interval of a gain: do it, do not, or not enough evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable

DO, DO_NOT, UNKNOWN = "do it", "do not", "not enough evidence"


def verdict(low: float, high: float, *, needed: float = 0.0) -> str:
    """Return "do it" if the whole interval of a gain is above `needed`, "do not" if it is below.

    NaN bounds, for too few documents, mean not enough evidence.

    Examples
    --------
    >>> from mixlens.stats.verdicts import verdict
    >>> verdict(0.02, 0.05), verdict(-0.01, 0.03), verdict(-0.03, -0.01)
    ('do it', 'not enough evidence', 'do not')
    """
    return DO if low > needed else DO_NOT if high < needed else UNKNOWN


def of_all(verdicts: Iterable[str]) -> str:
    """Combine verdicts: "do it" if all hold, "do not" if one is refuted."""
    found = [*verdicts]
    return DO_NOT if DO_NOT in found else DO if found and UNKNOWN not in found else UNKNOWN


def level_of_each(level: float, claims: int) -> float:
    """Return the level of each of several intervals that together have the given level (Bonferroni)."""
    return 1 - (1 - level) / claims


def fewest_units(level: float) -> int:
    """Return the smallest number of documents for an interval of this level to count as evidence.

    If differences are equally likely to be positive and negative, all n share a sign with probability 2^(1 - n).
    """
    return math.ceil(1 - math.log2(1 - level))
