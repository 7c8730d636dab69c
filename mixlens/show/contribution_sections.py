"""The sections of a report on contributions and on a sweep over k: from what was measured to HTML."""

from __future__ import annotations

import xarray as xr


def contribution_sections(contributions: xr.Dataset, name: str) -> dict[str, str]:
    return {}


def topk_sections(measured: xr.Dataset, name: str) -> dict[str, str]:
    return {}
