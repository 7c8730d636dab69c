"""Numbers as text: estimates with intervals, and tables of main numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import xarray as xr

MISSING = "n/a"  # shown for an undefined number
NO_INTERVAL = "no interval"  # shown for a number with too little data for bounds


def interval(estimate: float, low: float, high: float, decimals: int, *, factor: float = 1.0) -> str:
    """Format an estimate with its interval, as "1.5 [1.2, 1.9]"."""
    if estimate != estimate:
        return MISSING
    bounds = f"{factor * low:,.{decimals}f}, {factor * high:,.{decimals}f}" if low == low else NO_INTERVAL
    return f"{factor * estimate:,.{decimals}f} [{bounds}]"


def interval_of(row: Mapping[Any, Any] | pd.Series, factor: float, decimals: int) -> str:
    """Format the estimate, ci_low and ci_high of a row of a table."""
    estimate, low, high = (float(row[name]) for name in ("estimate", "ci_low", "ci_high"))
    return interval(estimate, low, high, decimals, factor=factor)


def row(cell: xr.Dataset, unit: str) -> dict[str, Any]:
    """Return estimate, ci_low, ci_high, unit and n of a Dataset without dimensions."""
    return {name: float(cell[name]) for name in ("estimate", "ci_low", "ci_high")} | {"unit": unit, "n": int(cell.n)}


def shown(overview: pd.DataFrame) -> pd.DataFrame:
    """Format an overview as text: estimate with unit and interval, and n; fractions in per cent."""

    def text(row: pd.Series) -> str:
        if row.estimate != row.estimate:
            return MISSING
        scale, sign = (100, " %") if row.unit == "fraction" else (1, f" {row.unit}".rstrip())
        numbers = [f"{scale * row[name]:.4g}" for name in ("estimate", "ci_low", "ci_high")]
        interval = NO_INTERVAL if row.ci_low != row.ci_low else f"{numbers[1]}, {numbers[2]}"
        return f"{numbers[0]}{sign} [{interval}]"

    return pd.DataFrame({"": overview.apply(text, axis=1), "n": overview["n"].map("{:,}".format)})


def numbered(numbers: Sequence[int]) -> str:
    """Format numbers, as a range if contiguous: "0 to 31", "1, 3, 5"."""
    contiguous = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]} to {numbers[-1]}" if contiguous else ", ".join(map(str, numbers))
