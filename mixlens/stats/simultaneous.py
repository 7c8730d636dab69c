"""Simultaneous intervals over all cells of a statistic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Share
from mixlens.stats.clusters import By
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import Summed, summed_by

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def simultaneous(
    trace: Trace,
    statistic: Callable[..., xr.Dataset],
    *,
    by: By = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute a statistic with simultaneous intervals: in 95 % of recordings, all cells contain the truth.

    Each bootstrap draw gives the largest distance of any cell from its estimate, in standard errors of the cell (max-t,
    Westfall and Young 1993). The intervals are widened to the 95th percentile of these, on the scale of t with the
    cell's own degrees of freedom.

    Parameters
    ----------
    trace : Trace
        The recording.
    statistic : Callable
        Function of `ml.stats` that takes a trace, such as ``ml.stats.expert_share``.
    by : By, optional
        Column, or columns, of the sequences to group by; all groups are held at once.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Level and number of draws.

    Returns
    -------
    xarray.Dataset
        Result of the statistic with wider ci_low, ci_high; attrs reach (of the widest, in standard errors) and
        simultaneous (number of cells).

    Raises
    ------
    BadInput
        If `by` names an unknown column, or the statistic is not a function of sums over documents.

    Examples
    --------
    >>> together = ml.stats.simultaneous(trace, ml.stats.expert_share)
    >>> bool((together["ci_high"] >= ml.stats.expert_share(trace)["ci_high"]).all())
    True
    """
    from scipy.special import ndtr, stdtrit

    trace = clustered(trace, cluster)
    require(trace, "simultaneous", bootstrap=bootstrap)
    grouped = partial(statistic, by=by) if by is not None else statistic
    data = grouped(trace, bootstrap=bootstrap)
    summed = summed_by(grouped, trace)
    furthest = np.max([_furthest(summed.only(g), bootstrap, int(g)) for g in np.unique(summed.group)], axis=0)
    reach = max(float(np.quantile(furthest, bootstrap.level)), NormalDist().inv_cdf((1 + bootstrap.level) / 2))
    freedom = np.maximum(data["n_effective"] - 1, 1)
    wider = xr.apply_ufunc(stdtrit, freedom, ndtr(reach)) / xr.apply_ufunc(stdtrit, freedom, (1 + bootstrap.level) / 2)
    estimate, dims = data["estimate"], data["estimate"].dims
    low = (estimate - (estimate - data["ci_low"]) * wider).transpose(*dims)
    high = (estimate + (data["ci_high"] - estimate) * wider).transpose(*dims)
    if data.attrs["interval"] == Share.how:
        low, high = low.clip(0, 1), high.clip(0, 1)
    cells = int(np.isfinite(low).sum())
    return data.assign(ci_low=low, ci_high=high).assign_attrs(reach=reach, simultaneous=cells)


def _furthest(summed: Summed, bootstrap: Bootstrap, stream: int) -> np.ndarray:
    """Return the largest distance of any cell from its mean [replicate], in standard deviations of the cell."""
    draws = bootstrap.draw(summed.n, stream)
    furthest = np.zeros(len(draws))
    for layers in summed.chunks():
        values = summed.values(layers, draws)
        values = values.reshape(-1, len(draws))
        values = values[np.isfinite(values).all(-1)]
        away, spread = np.abs(values - values.mean(-1, keepdims=True)), values.std(-1, keepdims=True)
        of_cells = np.divide(away, spread, out=np.zeros_like(away), where=spread > 1e-12)
        furthest = np.maximum(furthest, of_cells.max(0, initial=0))
    return furthest
