"""Printing and writing of tables by commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlens.cli.app import Result
from mixlens.core.files import write_file
from mixlens.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def rows_of(frame: Any) -> list[dict[str, Any]]:
    """Return the rows of a frame as plain values, NaN as None."""
    return json.loads(frame.to_json(orient="records", double_precision=15))


def statistic(data: xr.Dataset, *, csv: str | None, also: Sequence[str] = ()) -> Result:
    """Return a statistic with the variables `also` and its test results, or write it to a CSV file."""
    from mixlens.plot.tables import tidy

    frame = tidy(data, also=(*also, *(name for name in ("p", "q", "survives") if name in data)))
    if csv:
        return written(frame, csv)
    attrs = {str(key): value.tolist() if hasattr(value, "tolist") else value for key, value in data.attrs.items()}
    text = frame.to_string(index=False, float_format=lambda value: f"{value:.4f}")
    source = f"{data.attrs.get('formula', '')}\nsource: {data.attrs.get('source', '')}"
    return Result({"statistic": data.attrs["statistic"], "attrs": attrs, "rows": rows_of(frame)}, f"{text}\n\n{source}")


def check_csv(path: str | None) -> None:
    """Raise BadInput if the CSV file cannot be written; called before the table is computed."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise BadInput(
            f"Cannot write the table to {path}: it is not a file in an existing folder. Pass another path as --csv.",
            argument="--csv",
            value=path,
        )


def written(frame: pd.DataFrame, path: str) -> Result:
    """Write a frame as CSV in which no cell is read as a formula.

    Raises BadInput if the path cannot be a file, and RunError if the file cannot be written.
    """
    check_csv(path)
    write_file(path, frame.rename(columns=_no_formula).map(_no_formula).to_csv(index=False))
    return Result({"written": path, "rows": len(frame)})


def _no_formula(cell: Any) -> Any:
    """Prefix text that a spreadsheet would evaluate with an apostrophe, which spreadsheets hide."""
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")  # readers start a row at \r, even within quotes
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\n")) else cell
