"""Settings of intervals and resampling."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np

from mixlens.errors import BadInput


@dataclass(frozen=True)
class Bootstrap:
    """Settings of intervals, whose independent units are documents (or requests), not tokens.

    Each Dataset names its method in ``attrs["interval"]``; the method suits the kind of quantity. Statistics of
    documents use a jackknife and draw nothing; ratios between benchmarks, and the knee of a sweep over loads, resample
    requests. A single document has no interval. An interval always contains its estimate.

    Parameters
    ----------
    level : float, optional
        Nominal coverage.
    replicates : int, optional
        Number of bootstrap samples, where requests are resampled.
    seed : int, optional
        Seed of resampling and permutation; the same seed gives the same interval.

    Raises
    ------
    BadInput
        If the level is outside (0, 1), there are fewer than 10 replicates, or the seed is negative.

    Examples
    --------
    >>> ml.stats.Bootstrap(level=0.9).level
    0.9
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
        if self.seed < 0:
            raise BadInput(
                f"Cannot draw with the seed {self.seed}: seeds begin at 0. Pass 0, for example.",
                argument="seed",
                value=self.seed,
            )

    def reach(self, units: np.ndarray) -> np.ndarray:
        """Return the half-width of an interval in standard errors, sqrt(n / (n - 1)) t(n - 1).

        Parameters
        ----------
        units : numpy.ndarray
            Number n of documents or requests, at least two.
        """
        from scipy.special import stdtrit  # imported here: takes a quarter of a second

        return np.sqrt(units / (units - 1)) * stdtrit(units - 1, (1 + self.level) / 2)

    def draw(self, n: int, stream: int = 0) -> np.ndarray:
        """Return bootstrap weights [replicate, n]: the number of times each unit is drawn, n draws per replicate.

        Parameters
        ----------
        n : int
            Number of units.
        stream : int, optional
            Makes the draws of different groups independent.
        """
        drawn = np.random.default_rng([self.seed, stream]).integers(n, size=(self.replicates, n))
        weights = np.zeros(self.replicates * n)
        # Ten times as fast as numpy's multinomial.
        np.add.at(weights, (drawn + n * np.arange(self.replicates)[:, None]).ravel(), np.float64(1))
        return weights.reshape(self.replicates, n)


DEFAULT = Bootstrap()
