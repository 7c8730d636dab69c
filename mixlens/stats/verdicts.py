"""Verdicts: do it, do not, or not enough evidence, from the interval of a gain."""

from __future__ import annotations

import math
from collections.abc import Iterable

DO, DO_NOT, UNKNOWN = "do it", "do not", "not enough evidence"


def verdict(low: float, high: float, *, needed: float = 0.0) -> str:
    """Return "do it" where the whole interval of a gain lies above what is needed, "do not" where it lies below.

    NaN for bounds, where there are too few documents for an interval, is not enough evidence.

    Examples
    --------
    >>> from mixlens.stats.verdicts import verdict
    >>> verdict(0.02, 0.05), verdict(-0.01, 0.03), verdict(-0.03, -0.01)
    ('do it', 'not enough evidence', 'do not')
    """
    return DO if low > needed else DO_NOT if high < needed else UNKNOWN


def of_all(verdicts: Iterable[str]) -> str:
    """What follows from several claims: "do it" where all hold, "do not" where one is refuted."""
    found = [*verdicts]
    return DO_NOT if DO_NOT in found else DO if found and UNKNOWN not in found else UNKNOWN


def level_of_each(level: float, claims: int) -> float:
    """The level of so many intervals that hold at once as often as one of `level` does (Bonferroni)."""
    return 1 - (1 - level) / claims


def fewest_units(level: float) -> int:
    """Return the fewest documents of which an interval of this level may be taken for evidence.

    Of n documents whose differences are as often above zero as below, all lie on one side with probability 2^(1 - n).
    """
    return math.ceil(1 - math.log2(1 - level))
