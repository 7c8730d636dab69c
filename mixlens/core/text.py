"""The main numbers of a comparison as a table: a row a number, with its unit, interval and n."""

from __future__ import annotations

from typing import Any

import pandas as pd
import xarray as xr


def row(cell: xr.Dataset, unit: str) -> dict[str, Any]:
    """estimate, ci_low, ci_high, unit and n of a Dataset without dimensions."""
    return {name: float(cell[name]) for name in ("estimate", "ci_low", "ci_high")} | {"unit": unit, "n": int(cell.n)}


def shown(overview: pd.DataFrame) -> pd.DataFrame:
    """An overview as text: estimate with unit and interval, and n; shares in per cent."""

    def text(row: pd.Series) -> str:
        if row.estimate != row.estimate:
            return "not available"
        scale, sign = (100, " %") if row.unit == "fraction" else (1, f" {row.unit}".rstrip())
        numbers = [f"{scale * row[name]:.4g}" for name in ("estimate", "ci_low", "ci_high")]
        interval = "no interval" if row.ci_low != row.ci_low else f"{numbers[1]}, {numbers[2]}"
        return f"{numbers[0]}{sign} [{interval}]"

    return pd.DataFrame({"": overview.apply(text, axis=1), "n": overview["n"].map("{:,}".format)})
