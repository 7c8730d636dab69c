"""Intervals, one way for each kind of quantity; what is independent of each other is documents, not tokens.

A quantity comes with the sums of all documents and the sums without each of them. Leaving each document out once (the
jackknife) says how far the quantity moves with the documents, which is its standard error, and how it is biased. The
kind of quantity says what follows from that:

========== ============================================== ===========================================================
Share      a proportion                                   Clopper and Pearson's bounds for the effective number of what
                                                          is counted (Korn and Graubard 1998)
Mean       a mean of what is never negative               bounds of a gamma distribution (Fay and Feuer 1997)
Difference a mean of either sign                          Student's t
Smooth     another function of sums, perhaps biased       Student's t, less the jackknife's estimate of the bias
Largest    the largest of several proportions             from the bounds of those that may be the largest
========== ============================================== ===========================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from mixlens.core.quantiles import beta_quantile, t_quantile

# Events added above: one makes bounds exact for events that are all alike. Of documents that are not, the variance is
# underestimated by those few that miss the largest. With three the bounds of few skewed documents hold, with two those
# of 20 and more (see the benchmark).
_SKEWED, _SKEWED_FEW, _FEW = 2.0, 3.0, 20
# Rivals for the largest share are seldom all alike, and then the bounds of the lesser ones are missed by none.
_RIVALS = 1.35

Through = Callable[[np.ndarray], np.ndarray]
Bounds = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Jackknife:
    """A quantity, and what leaving out each unit says of it; all [...].

    error     standard error
    bias      of the estimate
    freedom   degrees of freedom of the error: at most one less than Kish's effective number of units, and fewer where
              few units make up most of it, which the kurtosis of their influence tells (Satterthwaite's approximation)
    skewness  of the estimate, from that of the units' influence
    """

    estimate: np.ndarray
    error: np.ndarray
    bias: np.ndarray
    freedom: np.ndarray
    skewness: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, sizes: np.ndarray) -> Jackknife:
        """From a quantity of all units and without each [..., 1 + unit]; NaN where fewer than two units have a size.

        sizes  [unit] or [..., unit], how much each unit has to say
        """
        estimate, without = values[..., 0], values[..., 1:]
        n, effective = np.float64(without.shape[-1]), effective_number(sizes)
        mean = without.sum(-1) / max(n, 1)
        known: np.ndarray | float = n
        if (some := np.isnan(mean) & np.isfinite(estimate)).any():  # a unit without which there is no value
            there = np.isfinite(without)
            known = there.sum(-1)
            mean = np.where(some, np.where(there, without, 0).sum(-1) / np.maximum(known, 1), mean)
            away = np.where(there, without - mean[..., None], 0)
        else:
            away = without - mean[..., None]
        squares = away * away
        total = squares.sum(-1)
        total = np.where(total <= n * (1e-12 * estimate) ** 2, 0, total)  # rounding is no variation
        cubes, fourth = (np.einsum("...u,...u->...", squares, other) for other in (away, squares))
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.where(total > 0, n * fourth / total**2 - 3, 0)
            error = np.sqrt(total * effective / (effective - 1)) * (n - 1) / n
            freedom = 2 * n / (np.maximum(excess, 0) + 2 * n / (n - 1))
            skewness = np.where(total > 0, -cubes / total**1.5, 0)
        enough = np.isfinite(error) & (known >= 2)
        freedom = np.maximum(np.minimum(freedom, effective - 1), 1)
        return cls(estimate, np.where(enough, error, np.nan), (n - 1) * (mean - estimate), freedom, skewness)

    @classmethod
    def within(cls, values: np.ndarray, sizes: np.ndarray, group: np.ndarray) -> Jackknife:
        """As `of`, for units drawn within their group [unit]: errors of the groups add up; NaN where one is alone."""
        parts = [
            cls.of(np.concatenate([values[..., :1], values[..., 1:][..., group == one]], -1), sizes[..., group == one])
            for one in np.unique(group)
        ]
        squares, freedom = (np.stack(each) for each in zip(*((p.error**2, p.freedom) for p in parts), strict=True))
        total = squares.sum(0)
        # Welch and Satterthwaite's
        freedom = np.divide(total**2, (squares**2 / freedom).sum(0), out=freedom.min(0), where=total > 0)
        bias, unknown = np.sum([part.bias for part in parts], axis=0), np.full_like(total, np.nan)
        return cls(values[..., 0], np.sqrt(total), bias, freedom, unknown)

    def reach(self, tail: np.ndarray | float) -> np.ndarray:
        """How far Student's t reaches with this probability beyond it."""
        return self.error * t_quantile(self.freedom, tail)


@dataclass(frozen=True)
class Ratio(ABC):
    """A sum over another sum, both [..., 1 + unit]: of all units, and without each.

    through  increasing function that estimate and bounds are shown through
    """

    top: np.ndarray
    bottom: np.ndarray
    through: Through | None = None
    how: ClassVar[str]
    fewest: ClassVar[int] = 2

    @cached_property
    def ratio(self) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.top / self.bottom

    @cached_property
    def jackknife(self) -> Jackknife:
        return Jackknife.of(self.ratio, _own(self.bottom))

    @property
    def values(self) -> np.ndarray:
        return _shown(self.through, self.ratio)

    @property
    def skewness(self) -> np.ndarray:
        """Of the estimate [...], before it is shown."""
        return self.jackknife.skewness

    def bounds(self, sizes: np.ndarray, level: float) -> Bounds:
        """Lower and upper bound [...]; every unit counts by its own part of the sum below, whatever its size."""
        low, high = self._bounds(self.jackknife, (1 - level) / 2)
        return _around(self.ratio[..., 0], _shown(self.through, low), _shown(self.through, high), self.through)

    @abstractmethod
    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        """Lower and upper bound [...] that the truth lies beyond with this probability each."""


class Share(Ratio):
    """A proportion: the part `top` of what `bottom` counts."""

    how = "Clopper and Pearson for the effective number of what is counted (Korn and Graubard 1998)"

    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        return self._at(tail, tail)

    def effective(self, tail: np.ndarray | float) -> np.ndarray:
        """The number whose binomial variance equals the variance between units.

        Where no unit differs, as where none has it, the variance says nothing; then every unit counts once, since what
        few units have is often had by none of those at hand.
        """
        from scipy.special import ndtri

        jackknife, n = self.jackknife, self.bottom[..., 0]
        p = jackknife.estimate
        with np.errstate(divide="ignore", invalid="ignore"):
            found = p * (1 - p) * (ndtri(tail) / jackknife.reach(tail)) ** 2
        alike = ~((p > 0) & (p < 1) & (jackknife.error > 0))
        found = np.where(alike, effective_number(_own(self.bottom)), found)
        return np.maximum(found, np.minimum(1.0, n))

    def _at(self, tail_low: np.ndarray | float, tail_high: np.ndarray | float) -> Bounds:
        """Bounds that the truth lies beyond with these probabilities.

        Clopper and Pearson's for units that differ, those of Jeffreys for tokens that are as good as independent: of
        few events that are single ones the former cover more than they say (Brown, Cai and DasGupta 2001).
        """
        p = self.jackknife.estimate
        with np.errstate(invalid="ignore"):
            n_low = self.effective(tail_low)
            n_high = n_low if tail_high is tail_low else self.effective(tail_high)
            one_low, one_high = (1 - np.minimum(n / self.bottom[..., 0], 1) / 2 for n in (n_low, n_high))
            low = beta_quantile(p * n_low + 1 - one_low, (1 - p) * n_low + one_low, tail_low)
            high = beta_quantile(p * n_high + one_high, (1 - p) * n_high + 1 - one_high, 1 - tail_high)
        known = np.isfinite(p) & np.isfinite(n_low)
        low, high = np.where(p <= 0, 0.0, low), np.where(p >= 1, 1.0, high)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)


class Mean(Ratio):
    """A mean of what is never negative."""

    how = "gamma distribution with the variance between documents (Fay and Feuer 1997)"

    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        more = np.where((_own(self.bottom) > 0).sum(-1) < _FEW, _SKEWED_FEW, _SKEWED)
        return _gamma_bounds(jackknife, tail, more)


class Difference(Ratio):
    """A mean that may have either sign."""

    how = "Student's t, wider where documents are skewed (positive and negative part apart, Zou and Donner 2008)"

    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        """Student's t covers too little of what few documents make up. So the mean is also taken for the difference of
        its positive and its negative part, and the distances to their bounds are added like correlated errors.
        """
        reach, own = jackknife.reach(tail), np.moveaxis(_own(self.top), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [leaving_out(np.maximum(sign * own, 0)) / self.bottom for sign in (1, -1)]
        positive, negative = (Jackknife.of(part, _own(self.bottom)) for part in parts)
        covariance = (positive.error**2 + negative.error**2 - jackknife.error**2) / 2
        both = positive.error * negative.error
        correlation = np.where(both > 0, covariance / np.where(both > 0, both, 1), 0)

        def away(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return np.sqrt(np.maximum(one**2 + other**2 - 2 * correlation * one * other, reach**2))

        more = np.minimum(5 / effective_number(_own(self.bottom)), 1)
        (low, high), (low_n, high_n) = (_gamma_bounds(part, tail, more) for part in (positive, negative))
        below = away(positive.estimate - low, high_n - negative.estimate)
        above = away(high - positive.estimate, negative.estimate - low_n)
        return jackknife.estimate - below, jackknife.estimate + above


class Largest(Share):
    """The largest of several proportions, which lie along the last axis but one."""

    how = "from the bounds of the shares that may be the largest, at a level that their number divides (Bonferroni)"

    @property
    def values(self) -> np.ndarray:
        return _shown(self.through, self.ratio.max(-2))

    def bounds(self, sizes: np.ndarray, level: float) -> Bounds:
        miss = 1 - level
        half = miss / 2
        low, high = self._at(half, half)
        rivals = np.maximum((high >= low.max(-1, keepdims=True)).sum(-1, keepdims=True), 2)
        # Of m rivals each may be below its lower bound; that all are above their upper ones is rare.
        below = _RIVALS * miss / rivals
        low, high = self._at(below, miss - below)
        largest = self.ratio[..., 0].max(-1)
        low, high = _shown(self.through, low.max(-1)), _shown(self.through, high.max(-1))
        return _around(largest, low, high, self.through)


@dataclass(frozen=True)
class Smooth:
    """Another function of sums [..., 1 + unit] that changes little with each unit.

    floor    its smallest possible value
    fewest   units below which its intervals would cover too little
    through  as for Ratio
    """

    function: np.ndarray
    floor: float = -np.inf
    fewest: int = 2
    through: Through | None = None
    how: ClassVar[str] = "Student's t with the jackknife's standard error over documents, less its estimate of the bias"

    @property
    def values(self) -> np.ndarray:
        return _shown(self.through, self.function)

    @property
    def skewness(self) -> np.ndarray:
        """Of the estimate [...], before it is shown."""
        return Jackknife.of(self.function, np.ones(self.function.shape[-1] - 1)).skewness

    def bounds(self, sizes: np.ndarray, level: float) -> Bounds:
        """Lower and upper bound [...]; `sizes` [unit] says how much each unit has to say."""
        return self.bounds_of(Jackknife.of(self.function, sizes), level)

    def bounds_of(self, jackknife: Jackknife, level: float) -> Bounds:
        centre, reach = jackknife.estimate - jackknife.bias, jackknife.reach((1 - level) / 2)
        low, high = (_shown(self.through, np.maximum(bound, self.floor)) for bound in (centre - reach, centre + reach))
        return _around(jackknife.estimate, low, high, self.through)


Quantity = Ratio | Smooth


def with_bounds(quantity: Quantity, sizes: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate, lower and upper bound [...] from units of these sizes [unit]; NaN where they are too few."""
    estimate = quantity.values[..., 0]
    if len(sizes) < quantity.fewest:
        return estimate, np.full(estimate.shape, np.nan), np.full(estimate.shape, np.nan)
    low, high = quantity.bounds(sizes, level)
    return estimate, low, high


def said(quantities: Mapping[str, Quantity | type[Ratio]] | Quantity | type[Ratio]) -> str:
    """How the intervals of a quantity, or of several by name, are made."""
    if not isinstance(quantities, Mapping):
        few = f"; none of fewer than {quantities.fewest} documents" if quantities.fewest > 2 else ""
        return quantities.how + few
    names: dict[str, list[str]] = {}
    for name, quantity in quantities.items():
        names.setdefault(said(quantity), []).append(name)
    return "; ".join(f"{', '.join(of)}: {how}" for how, of in names.items()) if len(names) > 1 else next(iter(names))


def effective_number(sizes: np.ndarray) -> np.ndarray:
    """Kish's effective number of units, (sum n_d)^2 / sum n_d^2, from their sizes [..., unit]; NaN below two units."""
    total, squares = sizes.sum(-1), (sizes * sizes).sum(-1)
    several = (sizes > 0).sum(-1) >= 2
    effective = np.where(several, total * total / np.where(squares > 0, squares, 1), np.nan)
    return np.maximum(effective, 1.01)  # one giant beside dwarfs


def leaving_out(counts: np.ndarray) -> np.ndarray:
    """Counts of each unit [unit, ...] summed over all of them, and without each [..., 1 + unit]."""
    total = counts.sum(0, dtype=np.float64)
    out = np.empty((*counts.shape[1:], 1 + len(counts)))
    out[..., 0] = total
    np.subtract(total[..., None], np.moveaxis(counts, 0, -1), out=out[..., 1:])
    return out


def quantile_bounds(ordered: np.ndarray, q: float, level: float, unit: np.ndarray | None = None) -> tuple[float, float]:
    """Bounds of a quantile by order statistics (David and Nagaraja 2003, section 7.1), from sorted values from 0.

    The number of values below the quantile is binomial. Where there are too few values to bound it from above, as
    ten are for a 95th percentile, the bound is infinite, and the one below may be missed as often as both together;
    from below it is 0. Values of one `unit` are not independent: they count for as many as have the same variance of
    the share below the quantile (Woodruff 1952).
    """
    from scipy.special import bdtr

    n = len(ordered)
    effective = n if unit is None else _effective_below(ordered <= np.quantile(ordered, q), unit, level)
    tail = (1 - level) / 2
    below = bdtr(np.arange(effective), effective, q)  # P(at most i of the values lie below the quantile)
    high = int(np.searchsorted(below, 1 - tail, side="left"))
    low = int(np.searchsorted(below, tail if high < effective else 2 * tail, side="right")) - 1
    least = ordered[low * n // effective] if low >= 0 else 0.0
    most = ordered[-(-(high + 1) * n // effective) - 1] if high < effective else np.inf
    return float(least), float(most)


def _effective_below(below: np.ndarray, unit: np.ndarray, level: float) -> int:
    """Effective number of values of which some are `below` [value], in units [value]."""
    share = Share(leaving_out(np.bincount(unit, below)), leaving_out(np.bincount(unit).astype(float)))
    return max(1, int(share.effective((1 - level) / 2)))


def _gamma_bounds(jackknife: Jackknife, tail: float, more: np.ndarray | float) -> Bounds:
    """Those of so many events, each counted alike, that they have the relative variance of the mean; `more` above."""
    from scipy.special import gammaincinv, ndtri

    mean = jackknife.estimate
    with np.errstate(divide="ignore", invalid="ignore"):
        events = (mean * ndtri(tail) / jackknife.reach(tail)) ** 2
        low, high = gammaincinv(events, tail) * mean / events, gammaincinv(events + more, 1 - tail) * mean / events
    # So many events that the inverse gives up are as good as certain.
    varies = (jackknife.error > 0) & (events < 1e8)
    alike = np.where(np.isfinite(jackknife.error), mean, np.nan)
    return np.where(varies, low, alike), np.where(varies, high, alike)


def _own(sums: np.ndarray) -> np.ndarray:
    """What each unit has of sums of all units and without each [..., 1 + unit]."""
    return sums[..., :1] - sums[..., 1:]


def _shown(through: Through | None, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values if through is None else through(values)


def _around(estimate: np.ndarray, low: np.ndarray, high: np.ndarray, through: Through | None) -> Bounds:
    """The bounds, moved where they do not hold the estimate; NaN where there is none."""
    shown = _shown(through, estimate)
    return np.minimum(low, shown), np.maximum(high, shown)
