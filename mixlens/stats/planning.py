"""Planning: the number of documents needed for an interval or a contrast, given the observed variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput
from mixlens.stats.clusters import By
from mixlens.stats.inputs import clustered, require

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_MOST = 10_000_000  # documents; larger plans are not useful


def plan(
    trace: Trace,
    statistic: Callable[..., xr.Dataset],
    *,
    half_width: float,
    by: By = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute the number of documents needed for intervals of a given half-width.

    The smallest n with t(n - 1) s / sqrt(n) at most the half-width, with s the standard deviation between documents
    implied by the present interval. n is itself uncertain: estimated from ten documents, it is off by half.

    Parameters
    ----------
    trace : Trace
        Recording of at least two documents of the planned kind.
    statistic : Callable
        Function of `ml.stats` that takes a trace, such as ``ml.stats.expert_share``.
    half_width : float
        Half-width of the interval to reach, in the unit of the statistic.
    by : By, optional
        Column, or columns, of the sequences to group by; documents are then those of each group.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Level of the intervals.

    Returns
    -------
    xarray.Dataset
        documents, tokens (in as many documents) and now (the present half-width), of the shape of the estimate; NaN
        without an interval; attrs documents and tokens, those of the most demanding cell.

    Raises
    ------
    BadInput
        If the half-width is not a positive number, or the statistic has no intervals over documents.

    Examples
    --------
    >>> plan = ml.stats.plan(trace, ml.stats.expert_share, half_width=0.02)
    >>> plan["documents"].dims
    ('layer', 'expert')
    """
    trace = clustered(trace, cluster)
    require(trace, "plan", bootstrap=bootstrap)
    data = statistic(trace, bootstrap=bootstrap) if by is None else statistic(trace, by=by, bootstrap=bootstrap)
    return planned(data, half_width)


def planned(data: xr.Dataset, half_width: float) -> xr.Dataset:
    """Plan from a statistic that is already computed."""
    if not half_width > 0:
        raise BadInput(
            f"Cannot plan for a half-width of {half_width}: it is not a positive number. Pass 0.01, for example.",
            argument="half_width",
            value=half_width,
        )
    if "n_effective" not in data:
        raise BadInput(
            f"Cannot plan {data.attrs.get('statistic', 'this')}: it does not report the number of documents. "
            "Pass a statistic such as ml.stats.expert_share.",
            argument="statistic",
            value=data.attrs.get("statistic"),
        )
    now = (data["ci_high"] - data["ci_low"]) / 2
    level = float(data.attrs["level"])
    effective = xr.apply_ufunc(_least, now, data["n_effective"], half_width, level)
    documents = np.ceil(effective * data["n_documents"] / data["n_effective"])
    tokens = documents * data["n"] / data["n_documents"]
    found = xr.Dataset({"documents": documents, "tokens": np.ceil(tokens), "now": now})
    most = {name: float(found[name].max()) for name in ("documents", "tokens")}
    return found.transpose(*data["estimate"].dims, ...).assign_attrs(
        data.attrs | most | {"statistic": "plan", "of": data.attrs.get("statistic", ""), "half_width": half_width}
    )


def power(found: xr.Dataset, *, documents: int, difference: float | None = None) -> xr.Dataset:
    """Compute the probability that a contrast with more documents detects a difference.

    The probability under the noncentral t that a two-sided p is below the rate divided by the number of cells
    (Bonferroni, which is at least as strict as Benjamini and Hochberg's adjustment), with the variance of the given
    contrast.

    Parameters
    ----------
    found : xarray.Dataset
        Result of `stats.contrast`.
    documents : int
        Number of documents in each group.
    difference : float, optional
        True difference to detect, in every cell. None for the measured differences, which are inflated if they were
        selected for being large.

    Returns
    -------
    xarray.Dataset
        power (0 to 1), of the shape of the estimate; attrs documents, difference.

    Raises
    ------
    BadInput
        If `found` is not a contrast, or there are fewer than two documents.

    Examples
    --------
    >>> found = ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a="github")
    >>> likely = ml.stats.power(found, documents=50, difference=0.05)
    >>> likely["power"].dims
    ('layer', 'expert')
    """
    if not isinstance(found, xr.Dataset) or found.attrs.get("statistic") != "contrast":
        raise BadInput(
            f"Cannot compute the power of a {type(found).__name__}: expected a contrast. Pass what ml.stats.contrast "
            "returns.",
            argument="found",
            value=type(found).__name__,
        )
    if documents < 2:
        raise BadInput(
            f"Cannot compute the power of {documents} documents a group: a test takes two. Pass 2 or more.",
            argument="documents",
            value=documents,
        )
    from scipy.stats import nct, t

    level, n_a, n_b = (float(found.attrs[name]) for name in ("level", "n_a", "n_b"))
    reach = Bootstrap(level=level).reach(np.array(min(n_a, n_b)))
    error = (found["ci_high"] - found["ci_low"]) / 2 / reach
    paired = bool(found.attrs["paired"])
    scale = n_a / documents if paired else (2 / documents) / (1 / n_a + 1 / n_b)
    freedom = documents - 1 if paired else 2 * documents - 2
    looked_for = found["estimate"] if difference is None else difference
    critical = t.isf((1 - level) / max(int(found.attrs["cells"]), 1) / 2, freedom)
    shift = np.abs(looked_for) / (error * np.sqrt(scale))
    values = nct.sf(critical, freedom, shift) + nct.cdf(-critical, freedom, shift)
    of = found["estimate"].copy(data=np.clip(np.asarray(values, float), 0, 1))
    attrs: dict[str, Any] = {"statistic": "power", "of": found.attrs["of"], "documents": documents}
    return xr.Dataset({"power": of}, attrs=attrs | ({} if difference is None else {"difference": difference}))


def _least(now: np.ndarray, n: np.ndarray, half_width: float, level: float) -> np.ndarray:
    """Return the smallest number of documents that shrinks intervals of n documents from `now` to `half_width`."""
    from scipy.special import stdtrit

    tail = (1 + level) / 2
    spread = now * np.sqrt(n) / stdtrit(np.maximum(n - 1, 1.0), tail)
    low, high = np.full((2, *spread.shape), 2.0)
    high[:] = _MOST
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        enough = stdtrit(middle - 1, tail) * spread / np.sqrt(middle) <= half_width
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    at_least = stdtrit(1.0, tail) * spread / np.sqrt(2) <= half_width
    return np.where(np.isfinite(spread), np.where(at_least, 2.0, high), np.nan)
