"""Multiple testing: p values against a null, adjusted for the number of cells."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens.errors import BadInput

# Dimensions whose labels are separate questions, so that each label is a family of cells of its own.
_QUESTIONS = ("measure", "choice", "quantity")


def adjusted(p: np.ndarray) -> np.ndarray:
    """Compute q of Benjamini and Hochberg (1995) for p of any shape.

    min over i >= rank of p_(i) m / i, over the m values that are not NaN.

    Parameters
    ----------
    p : numpy.ndarray
        Values between 0 and 1; NaN stays NaN and is ignored.

    Returns
    -------
    numpy.ndarray
        Shape of `p`.

    Raises
    ------
    BadInput
        If a value is neither between 0 and 1 nor NaN.

    Examples
    --------
    >>> ml.stats.adjusted(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.04, 0.04]
    """
    from scipy.stats import false_discovery_control  # imported here: takes half a second

    try:
        p = np.asarray(p, float)
    except (TypeError, ValueError):
        p = np.array([np.inf])
    q, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if not ((p[known] >= 0) & (p[known] <= 1)).all():
        raise BadInput("Cannot adjust p: some are no numbers between 0 and 1. Pass p of tests.", argument="p")
    if known.any():
        q[known] = false_discovery_control(p[known])
    return q


def with_survivors(data: xr.Dataset, p: xr.DataArray, level: float) -> xr.Dataset:
    """Return `data` with p, q, survives and attrs["cells"] (per measure); the cells of a measure form one family."""
    question = next((dim for dim in p.dims if dim in _QUESTIONS), None)
    families = [p] if question is None else [p.sel({question: [label]}) for label in p[question].to_numpy()]
    q = [family.copy(data=adjusted(family.to_numpy())) for family in families]
    joined = q[0] if question is None else xr.concat(q, question)
    joined = joined.transpose(*p.dims)
    cells = max((int(np.isfinite(family).sum()) for family in families), default=0)
    return data.assign(p=p, q=joined, survives=joined <= 1 - level).assign_attrs(cells=cells)


def p_against(
    estimate: np.ndarray | float,
    low: np.ndarray | float,
    high: np.ndarray | float,
    null: np.ndarray | float,
    n: np.ndarray | float,
    level: float,
    skewness: np.ndarray | float | None = None,
) -> np.ndarray:
    """Compute p values of estimates with intervals against `null`, the value without an effect.

    The largest of three, because each alone can be too small:

    - one minus the level at which the interval would reach the null, its bounds scaled like those of t with n - 1
    degrees of freedom, so that p < 0.05 exactly if a 95 % interval excludes the null (Altman and Bland 2011,
    doi:10.1136/bmj.d2304);
    - the same with Hall's transformation for the `skewness` of the estimate (Hall 1992, J. R. Stat. Soc. B 54, 221),
    shifted by one standard error, sqrt(6) / n, against the finding: samples that are far from the null because they
    miss the largest values look less skewed than they are;
    - 2^(1 - n), the smallest p of a test that flips the signs of n units.

    NaN without an interval or a null, and if the units do not differ at all, which says nothing about their variance.
    `n` is the effective number of independent units, such as documents; `skewness` is that of the estimate, if known.
    """
    from scipy.special import stdtr, stdtrit

    above = np.greater(estimate, null)
    bound, freedom = np.where(above, low, high), np.maximum(np.asarray(n) - 1, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs((null - estimate) / (bound - estimate)) * stdtrit(freedom, (1 + level) / 2)
        t = np.where(np.equal(estimate, null), 0.0, np.where(above, t, -t))
        if skewness is not None:
            skewed = skewness - np.sign(t) * np.sqrt(6) / np.maximum(n, 1)
            t = np.minimum(np.abs(t), np.abs(t + skewed * t**2 / 3 + skewed**2 * t**3 / 27 + skewed / 6))
    p = 2 * stdtr(freedom, -np.abs(t))
    known = np.isfinite(bound) & (np.not_equal(bound, estimate) | np.equal(estimate, null))
    return np.where(known, np.maximum(p, np.exp2(1 - np.maximum(n, 1))), np.nan)
