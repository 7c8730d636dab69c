"""Statistics of made-up numbers: what is displayed of them is compared with these arrays, not with another statistic.

Layers are numbered with gaps, intervals are lopsided, every count is its own, and every seventh number is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

LAYERS = (2, 5, 9, 14)
DOMAINS = ("arxiv", "github", "wiki")


def made_up(dims: Mapping[str, Sequence[Any]], *, seed: int = 0, missing: bool = False, **attrs: Any) -> xr.Dataset:
    """Estimates between 0.02 and 0.4, intervals from 0.01 to 0.05 below and 0.02 to 0.09 above; half survive."""
    random = np.random.default_rng(seed)
    shape = tuple(len(values) for values in dims.values())
    estimate = random.uniform(0.02, 0.4, shape)
    if missing:
        estimate.reshape(-1)[3::7] = np.nan
    low, high = estimate - random.uniform(0.01, 0.05, shape), estimate + random.uniform(0.02, 0.09, shape)
    names = tuple(dims)
    data = xr.Dataset(
        {
            "estimate": (names, estimate),
            "ci_low": (names, low),
            "ci_high": (names, high),
            "n": (names, random.permutation(np.arange(1000, 1000 + estimate.size)).reshape(shape)),
            "n_documents": (names, random.permutation(np.arange(20, 20 + estimate.size)).reshape(shape)),
        },
        coords={name: list(values) for name, values in dims.items()},
    )
    # Whatever the intervals say, so that what is displayed is seen to follow the adjusted test alone.
    data["survives"] = (names, np.isfinite(estimate) & (np.random.default_rng([seed, 1]).random(shape) < 0.5))
    data["p"] = data["estimate"] * 0 + 0.01
    said = {
        "level": 0.9,
        "cells": int(np.isfinite(estimate).sum()),
        "replicates": 77,
        "seed": 5,
        "model": "sample",
        "formula": "f",
        "source": "s",
    }
    return data.assign_attrs({**said, "statistic": "expert_share", "unit": "fraction", "uniform": 0.125, **attrs})


def shares(
    domains: Sequence[str] = DOMAINS, layers: Sequence[int] = LAYERS, experts: int = 8, **more: Any
) -> xr.Dataset:
    return made_up({"domain": domains, "layer": layers, "expert": range(experts)}, **more)


def strokes(data: xr.Dataset, *dims: str) -> list[tuple[float, float]]:
    """Intervals in the order of `dims`, flat."""
    low, high = (data[name].transpose(*dims).to_numpy().ravel() for name in ("ci_low", "ci_high"))
    return list(zip(low.tolist(), high.tolist(), strict=True))
