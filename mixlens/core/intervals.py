"""Confidence intervals by kind of quantity. Documents, not tokens, are the independent units.

A quantity comes with its sums over all documents and over all but each one. The jackknife gives its standard error and
bias; the kind of quantity decides how the interval follows from them:

========== ============================================== ===========================================================
Share      a proportion                                   Clopper-Pearson bounds for the effective sample size
                                                          (Korn and Graubard 1998)
Mean       a mean of a nonnegative quantity               bounds of a gamma distribution (Fay and Feuer 1997)
Difference a mean of either sign                          Student's t
Smooth     another smooth function of sums, maybe biased  Student's t, minus the jackknife's estimate of the bias
Largest    the largest of several proportions             bounds of the shares that may be the largest
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

# Events added to an upper bound. One makes it exact for equal events. For documents of unequal size, the variance is
# underestimated if the sample misses the few largest: three events give coverage for few skewed documents, two for 20
# or more (see the benchmark).
_SKEWED, _SKEWED_FEW, _FEW = 2.0, 3.0, 20
# Rivals for the largest share are seldom equal, and then the lower bounds of the smaller ones hold anyway.
_RIVALS = 1.35

Through = Callable[[np.ndarray], np.ndarray]
Bounds = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Jackknife:
    """Jackknife estimates of a quantity; all arrays [...].

    error     standard error
    bias      of the estimate
    freedom   degrees of freedom of the error: at most Kish's effective number of units minus one, and fewer where few
              units dominate it, according to the kurtosis of their influence (Satterthwaite's approximation)
    skewness  of the estimate, from that of the units' influence
    """

    estimate: np.ndarray
    error: np.ndarray
    bias: np.ndarray
    freedom: np.ndarray
    skewness: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, sizes: np.ndarray) -> Jackknife:
        """Compute from a quantity over all units and without each [..., 1 + unit].

        sizes  [unit] or [..., unit], weight of each unit; the results are NaN if fewer than two have any
        """
        estimate, without = values[..., 0], values[..., 1:]
        n, effective = np.float64(without.shape[-1]), effective_number(sizes)
        mean = without.sum(-1) / max(n, 1)
        known: np.ndarray | float = n
        if (some := np.isnan(mean) & np.isfinite(estimate)).any():  # undefined without one of the units
            there = np.isfinite(without)
            known = there.sum(-1)
            mean = np.where(some, np.where(there, without, 0).sum(-1) / np.maximum(known, 1), mean)
            away = np.where(there, without - mean[..., None], 0)
        else:
            away = without - mean[..., None]
        squares = away * away
        total = squares.sum(-1)
        total = np.where(total <= n * (1e-12 * estimate) ** 2, 0, total)  # rounding error, not variation
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
        """As `of`, stratified by `group` [unit]: squared errors of groups add up; NaN if one has a single unit."""
        parts = [
            cls.of(np.concatenate([values[..., :1], values[..., 1:][..., group == one]], -1), sizes[..., group == one])
            for one in np.unique(group)
        ]
        squares, freedom = (np.stack(each) for each in zip(*((p.error**2, p.freedom) for p in parts), strict=True))
        total = squares.sum(0)
        # Welch-Satterthwaite
        freedom = np.divide(total**2, (squares**2 / freedom).sum(0), out=freedom.min(0), where=total > 0)
        bias, unknown = np.sum([part.bias for part in parts], axis=0), np.full_like(total, np.nan)
        return cls(values[..., 0], np.sqrt(total), bias, freedom, unknown)

    def reach(self, tail: np.ndarray | float) -> np.ndarray:
        """Return the distance of the Student's t bound with this tail probability from the estimate."""
        return self.error * t_quantile(self.freedom, tail)


@dataclass(frozen=True)
class Ratio(ABC):
    """A ratio of two sums, both [..., 1 + unit], over all units and without each.

    through  increasing transformation applied to the estimate and the bounds
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
        """Return the skewness of the estimate [...], before the transformation."""
        return self.jackknife.skewness

    def bounds(self, sizes: np.ndarray, level: float) -> Bounds:
        """Return lower and upper bounds [...]; units are weighted by the denominator, not by `sizes`."""
        low, high = self._bounds(self.jackknife, (1 - level) / 2)
        return _around(self.ratio[..., 0], _shown(self.through, low), _shown(self.through, high), self.through)

    @abstractmethod
    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        """Return lower and upper bounds [...] with this probability in each tail."""


class Share(Ratio):
    """A proportion: `top` out of the count `bottom`."""

    how = "Clopper-Pearson for the effective sample size (Korn and Graubard 1998)"

    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        return self._at(tail, tail)

    def effective(self, tail: np.ndarray | float) -> np.ndarray:
        """Return the effective sample size, at which the binomial variance equals the variance between units.

        If all units agree, for example because none has any events, the variance is uninformative, and each unit counts
        once: an event confined to few units is often absent from a sample.
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
        """Return bounds with these tail probabilities.

        Clopper-Pearson bounds for units that differ, Jeffreys bounds for nearly independent tokens, where the former
        are too conservative for few events (Brown, Cai and DasGupta 2001).
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
    """A mean of a nonnegative quantity."""

    how = "gamma distribution with the variance between documents (Fay and Feuer 1997)"

    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        more = np.where((_own(self.bottom) > 0).sum(-1) < _FEW, _SKEWED_FEW, _SKEWED)
        return _gamma_bounds(jackknife, tail, more)


class Difference(Ratio):
    """A mean that may have either sign."""

    how = "Student's t, wider where documents are skewed (bounds of positive and negative part, Zou and Donner 2008)"

    def _bounds(self, jackknife: Jackknife, tail: float) -> Bounds:
        """Widen Student's t, which covers too little if few documents dominate the mean.

        The mean is also the difference of its positive and its negative part; the distances to their bounds are
        combined like correlated errors.
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
    """The largest of several proportions along the second-last axis."""

    how = "from the bounds of the shares that may be the largest, with Bonferroni's correction for their number"

    @property
    def values(self) -> np.ndarray:
        return _shown(self.through, self.ratio.max(-2))

    def bounds(self, sizes: np.ndarray, level: float) -> Bounds:
        miss = 1 - level
        half = miss / 2
        low, high = self._at(half, half)
        rivals = np.maximum((high >= low.max(-1, keepdims=True)).sum(-1, keepdims=True), 2)
        # Each of m rivals may lie below its lower bound; that all lie above their upper bounds is rare.
        below = _RIVALS * miss / rivals
        low, high = self._at(below, miss - below)
        largest = self.ratio[..., 0].max(-1)
        low, high = _shown(self.through, low.max(-1)), _shown(self.through, high.max(-1))
        return _around(largest, low, high, self.through)


@dataclass(frozen=True)
class Smooth:
    """A smooth function of sums [..., 1 + unit], over all units and without each.

    floor    its smallest possible value
    fewest   number of units below which intervals would cover too little
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
        """Return the skewness of the estimate [...], before the transformation."""
        return Jackknife.of(self.function, np.ones(self.function.shape[-1] - 1)).skewness

    def bounds(self, sizes: np.ndarray, level: float) -> Bounds:
        """Return lower and upper bounds [...]; `sizes` [unit] weights the units."""
        return self.bounds_of(Jackknife.of(self.function, sizes), level)

    def bounds_of(self, jackknife: Jackknife, level: float) -> Bounds:
        centre, reach = jackknife.estimate - jackknife.bias, jackknife.reach((1 - level) / 2)
        low, high = (_shown(self.through, np.maximum(bound, self.floor)) for bound in (centre - reach, centre + reach))
        return _around(jackknife.estimate, low, high, self.through)


Quantity = Ratio | Smooth


def with_bounds(quantity: Quantity, sizes: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return estimate, lower and upper bounds [...] from units of these sizes [unit]; NaN bounds for too few units."""
    estimate = quantity.values[..., 0]
    if len(sizes) < quantity.fewest:
        return estimate, np.full(estimate.shape, np.nan), np.full(estimate.shape, np.nan)
    low, high = quantity.bounds(sizes, level)
    return estimate, low, high


def said(quantities: Mapping[str, Quantity | type[Ratio]] | Quantity | type[Ratio]) -> str:
    """Describe the interval method of a quantity, or of several by name."""
    if not isinstance(quantities, Mapping):
        few = f"; none of fewer than {quantities.fewest} documents" if quantities.fewest > 2 else ""
        return quantities.how + few
    names: dict[str, list[str]] = {}
    for name, quantity in quantities.items():
        names.setdefault(said(quantity), []).append(name)
    return "; ".join(f"{', '.join(of)}: {how}" for how, of in names.items()) if len(names) > 1 else next(iter(names))


def effective_number(sizes: np.ndarray) -> np.ndarray:
    """Return Kish's effective number of units, (sum n)^2 / sum n^2, for sizes [..., unit]; NaN below two units."""
    total, squares = sizes.sum(-1), (sizes * sizes).sum(-1)
    several = (sizes > 0).sum(-1) >= 2
    effective = np.where(several, total * total / np.where(squares > 0, squares, 1), np.nan)
    return np.maximum(effective, 1.01)  # one unit holds almost everything


def leaving_out(counts: np.ndarray) -> np.ndarray:
    """Return counts of units [unit, ...] summed over all units and over all but each [..., 1 + unit]."""
    total = counts.sum(0, dtype=np.float64)
    out = np.empty((*counts.shape[1:], 1 + len(counts)))
    out[..., 0] = total
    np.subtract(total[..., None], np.moveaxis(counts, 0, -1), out=out[..., 1:])
    return out


def quantile_bounds(ordered: np.ndarray, q: float, level: float, unit: np.ndarray | None = None) -> tuple[float, float]:
    """Return bounds of a quantile by order statistics (David and Nagaraja 2003, section 7.1), from sorted values >= 0.

    The number of values below the quantile is binomial. With too few values for an upper bound, such as ten for a 95th
    percentile, the bound is infinite and the lower one takes both tails; without a lower bound it is 0. Values of one
    `unit` are dependent and count as their effective number for the share below the quantile (Woodruff 1952).
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
    """Return the effective number of values, given which are `below` [value] and their units [value]."""
    share = Share(leaving_out(np.bincount(unit, below)), leaving_out(np.bincount(unit).astype(float)))
    return max(1, int(share.effective((1 - level) / 2)))


def _gamma_bounds(jackknife: Jackknife, tail: float, more: np.ndarray | float) -> Bounds:
    """Return gamma bounds for the number of equal events with this relative variance; `more` are added above."""
    from scipy.special import gammaincinv, ndtri

    mean = jackknife.estimate
    with np.errstate(divide="ignore", invalid="ignore"):
        events = (mean * ndtri(tail) / jackknife.reach(tail)) ** 2
        low, high = gammaincinv(events, tail) * mean / events, gammaincinv(events + more, 1 - tail) * mean / events
    # The inverse fails for so many events, which are as good as certain.
    varies = (jackknife.error > 0) & (events < 1e8)
    alike = np.where(np.isfinite(jackknife.error), mean, np.nan)
    return np.where(varies, low, alike), np.where(varies, high, alike)


def _own(sums: np.ndarray) -> np.ndarray:
    """Return the value of each unit from sums over all units and without each [..., 1 + unit]."""
    return sums[..., :1] - sums[..., 1:]


def _shown(through: Through | None, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values if through is None else through(values)


def _around(estimate: np.ndarray, low: np.ndarray, high: np.ndarray, through: Through | None) -> Bounds:
    """Extend the bounds to contain the estimate; NaN where it is undefined."""
    shown = _shown(through, estimate)
    return np.minimum(low, shown), np.maximum(high, shown)
