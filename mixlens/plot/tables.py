"""Tables of a statistic: tidy for pandas, sortable HTML, Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.text import NO_INTERVAL
from mixlens.plot import labels
from mixlens.plot.checks import check
from mixlens.plot.html import escape

_COUNTS = {"n": "n", "n_documents": "documents"}
_VALUES = ("estimate", "ci_low", "ci_high", "n", "n_documents")


def tidy(data: xr.Dataset, *, also: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row per number.

    The columns are the dimensions, then estimate, ci_low, ci_high, n, n_documents and the variables `also`. Values have
    the unit of the statistic; shares are fractions, not per cent.
    """
    check(data, "A table", "stats.expert_share, or another statistic,", "estimate")
    order = [str(d) for d in data["estimate"].dims]
    values = data[[name for name in (*_VALUES, *also) if name in data]]
    scalars = [name for name, coord in values.coords.items() if coord.ndim == 0]
    frame = values.drop_vars(scalars).to_dataframe(dim_order=order or None) if order else _single(values)
    extra = [name for name in frame.columns if name not in (*_VALUES, *also)]
    return frame.drop(columns=extra).reset_index(drop=not order)


def _single(values: xr.Dataset) -> pd.DataFrame:
    return pd.DataFrame({name: [values[name].item()] for name in values.data_vars})


def wide(data: xr.Dataset) -> pd.DataFrame:
    """Return one row per combination of all dimensions but the last, whose values are columns of (estimate, low, high).

    Layers are always rows. n and documents have their own columns, with a range if they differ within the row.
    """
    data = _laid_out(data)
    *down, across = [str(d) for d in data["estimate"].dims]
    missing = xr.full_like(data["estimate"], np.nan)
    stacked = np.stack([data.get(v, missing).transpose(*down, across).to_numpy() for v in _VALUES[:3]], axis=-1)
    counts = [name for name in _COUNTS if name in data]
    rows = []
    for place in np.ndindex(*(data.sizes[d] for d in down)):
        at = dict(zip(down, place, strict=True))
        row: list[object] = [_named(d, data[d].to_numpy()[i]) for d, i in at.items()]
        row += [tuple(map(float, cell)) for cell in stacked[place]]
        rows.append(row + [labels.span(_part(data[name], at)) for name in counts])
    heads = [*down, *(_column(across, value) for value in data[across].to_numpy()), *(_COUNTS[name] for name in counts)]
    return pd.DataFrame(rows, columns=pd.Index(heads))


def _part(counts: xr.DataArray, at: dict[str, int]) -> xr.DataArray:
    return counts.isel({d: i for d, i in at.items() if d in counts.dims})


def _named(dim: str, value: object) -> object:
    return labels.label(value, dim) if dim in labels.OURS else value


def _column(dim: str, value: object) -> str:
    return f"expert {value}" if dim == "expert" else f"j = {value}" if dim == "expert_j" else labels.label(value, dim)


def _laid_out(data: xr.Dataset) -> xr.Dataset:
    check(data, "A table", "stats.expert_share, or another statistic,", "estimate")
    last = data["estimate"].dims[-1:]
    return data if last and last[0] != "layer" else data.expand_dims({"": ["estimate"]}, axis=-1)


def html_table(data: xr.Dataset, caption: str = "") -> str:
    """Return a sortable table with the estimate above its interval in every cell; shares are in per cent.

    Clicking a heading sorts by its column, numerically and with missing values last.
    """
    frame, parts = wide(data), _parts(data)
    text = f"{caption or labels.title(data)}. {unit_note(data)}"
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name.replace("_", " "))}</button></th>'
        for name in frame.columns
    )
    body = "".join(
        f"<tr>{''.join(_cell(value, part) for value, part in zip(row, parts, strict=True))}</tr>"
        for row in frame.itertuples(index=False, name=None)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or labels.title(data))}">'
        f'<table class="sortable"><caption>{escape(text)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def unit_note(data: xr.Dataset) -> str:
    """Describe a cell: its unit, its interval, and the value under uniform routing."""
    scale = f"Per cent {labels.denominator(data)}".rstrip() if labels.is_fraction(data) else labels.unit(data)
    interval = labels.over(data) if "ci_low" in data else ""
    parts = [scale.capitalize(), interval, labels.uniform_note(data)]
    return "; ".join(part for part in parts if part) + "."


def _parts(data: xr.Dataset) -> list[xr.Dataset]:
    """Return for every column of the wide table the Dataset with its unit."""
    data = _laid_out(data)
    *down, across = data["estimate"].dims
    counts = [name for name in _COUNTS if name in data]
    return [data] * len(down) + [data.isel({across: i}) for i in range(data.sizes[across])] + [data] * len(counts)


def _cell(value: object, data: xr.Dataset) -> str:
    if isinstance(value, tuple):
        estimate, low, high = value
        if not math.isfinite(estimate):
            return '<td data-v="">–</td>'
        bounds = f"{labels.plain(low, data)} to {labels.plain(high, data)}" if math.isfinite(low) else NO_INTERVAL
        interval = f"<small>{bounds}</small>" if "ci_low" in data else ""
        return f'<td data-v="{estimate:.6g}">{labels.plain(estimate, data)}{interval}</td>'
    if isinstance(value, str) and value.replace(",", "").isdigit():
        return f'<td data-v="{value.replace(",", "")}">{value}</td>'
    return f"<td>{escape(value)}</td>"


def to_markdown(data: xr.Dataset) -> str:
    """Return the wide table in Markdown, with cells such as "12.3 [11.9, 12.8]"."""
    header, rows = _texts(data)
    return f"{markdown_lines(header, rows)}\n\n{unit_note(data)}\n"


# Characters with a meaning in Markdown or on GitHub within a cell. An underscore within a word and "[" alone have none.
_MARKUP = re.compile(r"[\\|`*<>~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|(?<=\])[(\[]|!(?=\[)")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def markdown_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose cells show every text literally."""
    lines = [[_MARKUP.sub(r"\\\g<0>", _one_line(cell, "□")) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _one_line(text: str, unseen: str) -> str:
    """Return `text` on one line, with control and direction characters replaced by `unseen`."""
    return _UNSEEN.sub(unseen, re.sub(r"\s*[\t\n\v\f\r\x85\u2028\u2029]\s*", " ", text))


LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "–": "--"}


def latex_line(cells: Sequence[str]) -> str:
    r"""Return a row of a tabular. A leading [ or * is protected, because LaTeX would read it as an argument of \\."""
    row = " & ".join("".join(LATEX.get(c, c) for c in _one_line(cell, "?")) for cell in cells)
    return ("{}" if row.startswith(("[", "*")) else "") + row + r" \\"


def to_latex(data: xr.Dataset) -> str:
    """Return the wide table as a LaTeX tabular with booktabs rules."""
    header, rows = _texts(data)
    lines = [latex_line(line) for line in (header, *rows)]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join(
        [
            f"% {unit_note(data)}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _texts(data: xr.Dataset) -> tuple[list[str], list[list[str]]]:
    frame, parts = wide(data), _parts(data)

    def text(value: object, part: xr.Dataset) -> str:
        if not isinstance(value, tuple):
            return str(value)
        estimate, low, high = (labels.plain(v, part) for v in value)
        bounds = NO_INTERVAL if low == "–" else f"{low}, {high}"
        return f"{estimate} [{bounds}]" if "ci_low" in part and estimate != "–" else estimate

    rows = frame.itertuples(index=False, name=None)
    return list(frame.columns), [[text(v, part) for v, part in zip(row, parts, strict=True)] for row in rows]
