"""Report section on a contrast of two conditions."""

from __future__ import annotations

from typing import Any

import xarray as xr

from mixlens import show
from mixlens.plot import labels
from mixlens.plot.html import details, frame_table, paragraphs, picture
from mixlens.plot.messages import message
from mixlens.plot.tables import tidy

_MOST = 5  # findings


def contrast_sections(data: xr.Dataset, name: str) -> dict[str, str]:
    """Return what differs between two conditions as HTML, by heading: figure and table."""
    a, b, of = (str(data.attrs[key]) for key in ("a", "b", "of"))
    frame = tidy(data, also=["p", "q", "survives"]).drop(columns="n")
    told = int(frame["survives"].sum())
    what = labels.TITLES.get(of, of.replace("_", " ")).lower()
    paired = "documents are paired" if data.attrs["paired"] else "documents are not paired"
    lead = (
        f"Difference in {what}, {a} ({data.attrs['n_a']} documents) less {b} ({data.attrs['n_b']} documents); "
        f"{paired}. {told} of {data.attrs['cells']} cells survive control for their number."
    )
    far = "large" if data.attrs["paired"] else "many standard errors, or p of Welch's t test where larger"
    how = (
        f"p: share of {data.attrs['permutations']:,} permutations of documents between the two with a difference at "
        f"least as {far}; q: p adjusted for the number of cells (Benjamini and Hochberg 1995); a cell survives where q "
        f"is at most {1 - data.attrs['level']:.2g}. Intervals: {data.attrs['level']:.0%}, {data.attrs['interval']}."
    )
    figures = [
        picture(
            show.contrast(part),
            f"{lead} {chosen}",
            f"{chosen}A cell is coloured where {a} and {b} differ, grey where nothing tells them apart.",
        )
        for chosen, part in _parts(data)
    ]
    table = details(f"All {len(frame):,} cells", frame_table(frame, f"{what}: {a} less {b}"))
    body = [paragraphs(lead), *figures, table, paragraphs(how)]
    return {contrast_title(data): "".join(body)}


def contrast_findings(data: xr.Dataset) -> list[tuple[str, str]]:
    """Return the largest differences that survive, with the heading of their section."""
    heading = contrast_title(data)
    return [(heading, sentence) for sentence in _findings(data)] or [(heading, f"{message(data)}.")]


def contrast_title(data: xr.Dataset) -> str:
    of = str(data.attrs["of"])
    what = labels.TITLES.get(of, of.replace("_", " ")).lower()
    return f"{data.attrs['a']} against {data.attrs['b']}: {what}"


def _findings(data: xr.Dataset) -> list[str]:
    a, b, of = (str(data.attrs[key]) for key in ("a", "b", "of"))
    scale, unit = (100, " points") if of in labels.DENOMINATORS else (1, "")
    frame = tidy(data, also=["p", "q", "survives"]).drop(columns="n")
    told = frame[frame["survives"]].sort_values("estimate", key=abs, ascending=False)
    return [_finding(row, a, b, scale, unit) for row in told.head(_MOST).to_dict("records")]


def _parts(data: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    """Split a contrast into figures: all of it, or each measure separately."""
    others = [str(dim) for dim in data["estimate"].dims if dim != "layer"]
    if "measure" in others:
        return [(f"{labels.label(m)}. ", data.sel(measure=m)) for m in data["measure"].values if len(others) < 3]
    return [("", data)] if len(others) < 2 else []


def _finding(row: dict[Any, Any], a: str, b: str, scale: float, unit: str) -> str:
    numbers = ("estimate", "ci_low", "ci_high", "p", "q", "survives")
    where = ", ".join(f"{name} {value}" for name, value in row.items() if name not in numbers)
    more = "more" if row["estimate"] > 0 else "less"
    estimate, low, high = (f"{scale * row[name]:+.3g}" for name in numbers[:3])
    return f"{where}: {more} in {a} than in {b}, {estimate}{unit} [{low}, {high}], q = {row['q']:.2g}."
