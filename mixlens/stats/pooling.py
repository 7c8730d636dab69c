"""Partial pooling: shrink estimates of small groups towards the mean of all groups."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens.errors import BadInput


def partial_pooling(data: xr.Dataset, *, over: str = "domain") -> xr.Dataset:
    """Shrink the estimates of small groups towards the mean of the groups (empirical Bayes, Morris 1983).

    A group's estimate y_g has the variance v_g of its interval. The variance tau^2 between groups is the variance of
    the estimates beyond that explained by the v_g (DerSimonian and Laird 1986). The distance of y_g from the mean
    shrinks by the share B_g = v_g / (v_g + tau^2): a group of two documents moves far, one of hundreds hardly. Over
    many small groups, the shrunk estimates are closer to the truth, and the most extreme one is no longer inflated; a
    single group that truly is an outlier is shrunk too much.

    Parameters
    ----------
    data : xarray.Dataset
        Statistic computed with ``by=``, with estimate, ci_low, ci_high and n_effective.
    over : str, optional
        Dimension of the groups.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high after shrinkage; unpooled, the original estimate; shrinkage (B_g, 0 to 1), of the
        shape of the estimate; mean and between (tau) of that shape without the groups. Groups without an interval keep
        their unpooled estimate, with shrinkage NaN.

    Raises
    ------
    BadInput
        If `data` lacks the dimension or intervals, or has fewer than three groups.

    Examples
    --------
    >>> share = ml.stats.expert_share(trace, by="domain")
    >>> pooled = ml.stats.partial_pooling(share)
    >>> bool((pooled["shrinkage"].fillna(0) >= 0).all())
    True
    """
    lacking = [name for name in ("estimate", "ci_low", "ci_high", "n_effective") if name not in data]
    if lacking or over not in data["estimate"].dims or data.sizes[over] < 3:
        raise BadInput(
            f"Cannot pool over {over!r}: the data has dimensions {dict(data['estimate'].sizes) if not lacking else {}}"
            f"{' and lacks ' + ' and '.join(lacking) if lacking else ''}. Pass a statistic computed with by= a column "
            "of three values or more.",
            argument="over",
            value=over,
        )
    from scipy.special import stdtrit

    level = float(data.attrs["level"])
    freedom = np.maximum(data["n_effective"] - 1, 1)
    reach = xr.apply_ufunc(stdtrit, freedom, (1 + level) / 2)
    y, variance = data["estimate"], ((data["ci_high"] - data["ci_low"]) / 2 / reach) ** 2
    known = np.isfinite(y) & np.isfinite(variance) & (variance > 0)
    y_known, weight = y.where(known), (1 / variance).where(known)
    total = weight.sum(over)
    fixed = (weight * y_known).sum(over) / total
    spread = (weight * (y_known - fixed) ** 2).sum(over)
    groups = known.sum(over)
    between = np.maximum((spread - (groups - 1)) / (total - (weight**2).sum(over) / total), 0).where(
        groups >= 3, np.nan
    )
    precision = (1 / (variance + between)).where(known)
    mean = (precision * y_known).sum(over) / precision.sum(over)
    shrinkage = (variance / (variance + between)).where(known & np.isfinite(between))
    # The mean and tau are estimated too (Morris 1983, eq. 1.16 to 1.18).
    error = variance * (1 - shrinkage) + shrinkage**2 / precision.sum(over)
    error = error + 2 / np.maximum(groups - 3, 1) * shrinkage**2 * (y - mean) ** 2
    half = reach * np.sqrt(error)
    pooled = mean + (1 - shrinkage) * (y - mean)
    dims = y.dims
    return data.drop_vars(["p", "q", "survives"], errors="ignore").assign(
        estimate=pooled.where(np.isfinite(shrinkage), y).transpose(*dims),
        ci_low=(pooled - half).transpose(*dims),
        ci_high=(pooled + half).transpose(*dims),
        unpooled=y,
        shrinkage=shrinkage.transpose(*dims),
        mean=mean,
        between=np.sqrt(between),
    )
