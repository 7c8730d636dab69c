"""Statistics of the sizes of expert outputs."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens.errors import BadInput

SUPER_EXPERTS = "Su et al. 2025, Unveiling Super Experts in Mixture-of-Experts Large Language Models, arXiv 2507.23279"


def super_experts(outputs: xr.Dataset) -> xr.Dataset:
    """Find experts whose down projection outputs far larger values than those of other experts.

    max_abs > P99.5 of all experts and max_abs > max / 10 (Su et al. 2025). The largest of all always passes both tests,
    so check `over_median`: without a super expert it is near 1.

    Parameters
    ----------
    outputs : xarray.Dataset
        Result of expert_outputs, with max_abs [layer, expert].

    Raises
    ------
    BadInput
        If max_abs is missing. Returns Dataset is_super, max_abs, over_median (max_abs relative to the median expert)
        [layer, expert].

    Examples
    --------
    >>> outputs = ml.experiments.expert_outputs(model, documents[:2], settings=quiet)
    >>> type(ml.stats.super_experts(outputs)).__name__
    'Dataset'
    """
    if not isinstance(outputs, xr.Dataset) or "max_abs" not in outputs:
        raise BadInput(
            f"Cannot find super experts: this {type(outputs).__name__} has no max_abs. Pass what expert_outputs or "
            "stats.expert_contribution returns.",
            argument="max_abs",
            value=type(outputs).__name__,
        )
    largest = outputs.max_abs
    known = largest.values[np.isfinite(largest.values)]
    limit = max(float(np.percentile(known, 99.5)), float(known.max()) / 10) if len(known) else np.nan
    median = float(np.median(known)) if len(known) else np.nan
    return xr.Dataset(
        # If all are equal, the largest equals P99.5, and no expert is above it.
        {"is_super": largest > limit, "max_abs": largest, "over_median": largest / median},
        attrs={
            "statistic": "super_experts",
            "limit": limit,
            "formula": "max_abs > P99.5 and max_abs > max / 10",
            "source": SUPER_EXPERTS,
            "model": outputs.attrs.get("model", "unknown"),
        },
    )
