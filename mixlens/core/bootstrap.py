"""Uncertainty: a bootstrap over documents, since the tokens of one document are not independent."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from statistics import NormalDist

import numpy as np

from mixlens.errors import BadInput

# Beyond this many documents the jackknife and the bootstrap agree on the standard error, so only one is computed.
_JACKKNIFE_DOCUMENTS = 256
# With fewer documents than this, percentiles of a bootstrap cover too little, of biased statistics above all.
FEW = 64

_normal_cdf = np.vectorize(NormalDist().cdf, otypes=[float])


@dataclass(frozen=True)
class Bootstrap:
    """Settings of intervals, which take documents and not tokens for the independent units.

    Each Dataset names its method in ``attrs["interval"]``.

    - Proportions of tokens have the bounds of Clopper and Pearson for an effective number of tokens (Korn and Graubard
      1998), which stay within 0 and 1 and are no single point where something was never seen.
    - Other statistics of fewer than 64 documents have jackknife intervals with t (Tukey 1958), corrected for bias where
      a statistic is biased in small samples (a coefficient of variation, a mutual information).
    - Those of more documents have the expanded percentile interval of a bootstrap (Hesterberg 2015, section 5.2), whose
      percentiles are those of a t distribution. Where the jackknife's standard error is larger than the bootstrap's,
      they are widened by their ratio. Replicates of a biased statistic are moved back by twice the bias that the
      bootstrap finds, for estimate and replicates each carry it once.

    The number of documents is Kish's effective number, (sum n_d)^2 / sum n_d^2. One document has no interval. An
    interval always holds its estimate.

    Parameters
    ----------
    level : float, optional
        Coverage aimed at.
    replicates : int, optional
        Number of bootstrap samples.
    seed : int, optional
        Of the draws; the same seed gives the same interval.

    Raises
    ------
    BadInput
        For a level outside (0, 1) or fewer than 10 replicates.

    Examples
    --------
    >>> ml.stats.Bootstrap(replicates=200).level
    0.95
    """

    level: float = 0.95
    replicates: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise BadInput(
                f"Cannot compute intervals of level {self.level}: a level lies between 0 and 1. Pass 0.95, for "
                "example.",
                argument="level",
                value=self.level,
            )
        if not isinstance(self.replicates, Integral) or self.replicates < 10:
            raise BadInput(
                f"Cannot compute intervals from {self.replicates} replicates: at least 10 are needed. Pass 1000 for a "
                "level of 0.95.",
                argument="replicates",
                value=self.replicates,
            )

    def resample(self, n: int, stream: int = 0) -> Resamples:
        """Return weights of `n` documents in every replicate; `stream` keeps the draws of different groups independent.

        Parameters
        ----------
        n : int
            Number of documents.
        stream : int, optional
            Whether the answer is streamed.
        """
        left_out = 1 - np.eye(n) if n <= _JACKKNIFE_DOCUMENTS else np.empty((0, n))
        return Resamples(np.concatenate([np.ones((1, n)), left_out, self._draw(n, stream)]), len(left_out))

    def resample_within(self, group: np.ndarray) -> Resamples:
        """Return weights of documents drawn within their group [document], so that every group keeps its size.

        Parameters
        ----------
        group : numpy.ndarray
            Group of each document.
        """
        weights = np.ones((1 + self.replicates, len(group)))
        for stream, label in enumerate(np.unique(group)):
            members = np.flatnonzero(group == label)
            weights[1:, members] = self._draw(len(members), stream)
        return Resamples(weights, 0)

    def reach(self, documents: np.ndarray, n_groups: int = 1) -> np.ndarray:
        """Return the standard errors that the expanded percentile interval spans, for effective numbers of documents.

        sqrt(n / (n - 1)) t(n - 1); for n documents drawn within g groups sqrt(n / (n - g)) t(n - g).

        Parameters
        ----------
        documents : numpy.ndarray
            Strings, mappings with a text column, or a datasets.Dataset.
        n_groups : int, optional
            Effective numbers of documents.
        """
        from scipy.special import stdtrit  # here, since it takes a quarter of a second

        n = np.maximum(documents, 1.01 * n_groups)
        return np.sqrt(n / (n - n_groups)) * stdtrit(np.maximum(n - n_groups, 1.0), (1 + self.level) / 2)

    def _draw(self, n: int, stream: int) -> np.ndarray:
        """[replicate, n] how often each document is drawn, n draws a replicate; ten times as fast as multinomial."""
        drawn = np.random.default_rng([self.seed, stream]).integers(n, size=(self.replicates, n))
        weights = np.zeros(self.replicates * n)
        np.add.at(weights, (drawn + n * np.arange(self.replicates)[:, None]).ravel(), np.float64(1))
        return weights.reshape(self.replicates, n)


DEFAULT = Bootstrap()


@dataclass(frozen=True)
class Resamples:
    """Weights of n documents [resample, n]: first all of them, then each left out once, then the bootstrap draws."""

    weights: np.ndarray
    n_left_out: int

    def sums(self, counts: np.ndarray) -> np.ndarray:
        """Counts of each document [n, ...] added up in every resample: [..., resample]."""
        n = len(counts)
        return (counts.reshape(n, -1).T @ self.weights.T).reshape(*counts.shape[1:], len(self.weights))

    def centred(self, values: np.ndarray) -> np.ndarray:
        """Values [..., resample] with the bootstrap replicates moved so that their mean is the estimate."""
        split = 1 + self.n_left_out
        replicates = values[..., split:]
        moved = replicates - (_mean(replicates) - values[..., 0])[..., None]
        return np.concatenate([values[..., :split], moved], axis=-1)

    def interval(
        self,
        values: np.ndarray,
        reach: np.ndarray,
        floor: np.ndarray | float | None = None,
        *,
        smooth: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds [...] of a statistic evaluated in every resample.

        values  [..., resample], the statistic of `sums`
        reach   [...] standard errors to reach out, from `Bootstrap.reach`; bounds are NaN where it is NaN
        floor   None for a ratio of sums; for a statistic that is biased in small samples its smallest possible value:
                the interval is corrected for the bias and cut off there
        smooth  whether the statistic changes little with one document, as a quantile does not. Below FEW documents its
                bounds are then those of the jackknife with t: the percentiles of so few draws cover too little
        """
        if smooth and 2 <= self.n_left_out < FEW:
            return self._jackknife(values, reach, floor)
        split = 1 + self.n_left_out
        estimate, replicates = values[..., 0], np.sort(values[..., split:], axis=-1)
        n_valid = np.isfinite(replicates).sum(-1)
        z = reach * _jackknife_ratio(values[..., 1:split], replicates)
        tail = _normal_cdf(-np.nan_to_num(z, nan=0.0))
        low = _sorted_quantile(replicates, n_valid, tail)
        high = _sorted_quantile(replicates, n_valid, 1 - tail)
        if floor is not None:
            bias = _mean(replicates) - estimate
            low, high = np.maximum(low - 2 * bias, floor), np.maximum(high - 2 * bias, floor)
        known = np.isfinite(z) & np.isfinite(estimate) & (n_valid > 0)
        return (
            np.where(known, np.minimum(low, estimate), np.nan),
            np.where(known, np.maximum(high, estimate), np.nan),
        )

    def _jackknife(
        self, values: np.ndarray, reach: np.ndarray, floor: np.ndarray | float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Estimate and `reach` jackknife standard errors on either side (Tukey 1958), less the bias for a `floor`."""
        n, estimate = self.n_left_out, values[..., 0]
        left_out = values[..., 1 : 1 + n]
        half = reach * np.sqrt(n - 1) * _deviation(left_out)
        centre = estimate if floor is None else estimate - (n - 1) * (_mean(left_out) - estimate)
        low, high = centre - half, centre + half
        if floor is not None:
            low, high = np.maximum(low, floor), np.maximum(high, floor)
        known = np.isfinite(half) & np.isfinite(estimate) & (np.isfinite(left_out).sum(-1) >= 2)
        return (
            np.where(known, np.minimum(low, estimate), np.nan),
            np.where(known, np.maximum(high, estimate), np.nan),
        )

    def proportion_interval(
        self, values: np.ndarray, reach: np.ndarray, tokens: np.ndarray, documents: np.ndarray, level: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the proportion of tokens that have something: Korn and Graubard 1998, exact for the binomial.

        The bounds of Clopper and Pearson for an effective number of tokens: that whose binomial variance equals the
        variance between documents, with t in place of z, and never more than there are. Where the documents do not
        differ, as where no token has it, the variance says nothing; then each document counts as one token, since
        what is used in few documents is often used in none of those at hand.

        values     [..., resample], the proportion
        reach      [...] as in `interval`
        tokens     [...] and
        documents  [...] how many stand behind a proportion
        """
        from scipy.special import betaincinv, stdtrit

        split = 1 + self.n_left_out
        p = values[..., 0]
        jackknife = self.n_left_out >= 2
        error = np.sqrt(self.n_left_out - 1) * _deviation(values[..., 1:split]) if jackknife else 0.0
        error = error if jackknife else _deviation(values[..., split:])
        z = stdtrit(np.inf, (1 + level) / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = np.minimum(p * (1 - p) / error**2 * (z / reach) ** 2, tokens)
        inside = (p > 0) & (p < 1) & (error > 0)
        effective = np.where(inside, effective, documents)
        effective = np.maximum(effective, np.minimum(1.0, tokens))
        hits, tail = p * effective, (1 - level) / 2
        with np.errstate(invalid="ignore"):
            low = np.where(p <= 0, 0.0, betaincinv(np.maximum(hits, 1e-12), effective - hits + 1, tail))
            high = np.where(p >= 1, 1.0, betaincinv(hits + 1, np.maximum(effective - hits, 1e-12), 1 - tail))
        known = np.isfinite(p) & np.isfinite(reach)
        return np.where(known, np.minimum(low, p), np.nan), np.where(known, np.maximum(high, p), np.nan)


def effective_documents(sizes: np.ndarray) -> np.ndarray:
    """Kish's effective number of documents, from tokens of each [document, ...]; NaN where fewer than 2 have any."""
    total, squares = sizes.sum(0), (sizes * sizes).sum(0)
    several = (sizes > 0).sum(0) >= 2
    return np.where(several, total * total / np.where(squares > 0, squares, 1), np.nan)


def _jackknife_ratio(left_out: np.ndarray, replicates: np.ndarray) -> np.ndarray:
    """Jackknife over bootstrap standard error, within 1 and 1.5; 1 where either is not known."""
    n = left_out.shape[-1]
    if n < 2:
        return np.ones(replicates.shape[:-1])
    jackknife = np.sqrt(n - 1) * _deviation(left_out)
    bootstrap = np.sqrt(n / (n - 1)) * _deviation(replicates)
    ratio = np.divide(jackknife, bootstrap, out=np.ones_like(jackknife), where=bootstrap > 0)
    return np.clip(np.nan_to_num(ratio, nan=1.0), 1.0, 1.5)


def _mean(values: np.ndarray) -> np.ndarray:
    valid = np.isfinite(values)
    return np.where(valid, values, 0).sum(-1) / np.maximum(valid.sum(-1), 1)


def _deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation of the finite values along the last axis."""
    return np.sqrt(_mean((values - _mean(values)[..., None]) ** 2))


def _sorted_quantile(ordered: np.ndarray, n_valid: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Quantile p [...] of values sorted along the last axis, of which the first n_valid [...] are numbers."""
    at = p * np.maximum(n_valid - 1, 0)
    below = at.astype(np.intp)
    above = np.minimum(below + 1, np.maximum(n_valid - 1, 0))
    low = np.take_along_axis(ordered, below[..., None], -1)[..., 0]
    high = np.take_along_axis(ordered, above[..., None], -1)[..., 0]
    return low + (high - low) * (at - below)
