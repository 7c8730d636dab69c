"""Pareto: several quantization schemes of one model, with quality, size and speed."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from mixlens.core.run_dir import open_run
from mixlens.core.text import interval_of
from mixlens.errors import BadInput, visible

KIND, TABLE = "pareto", "table.parquet"
COLUMNS = ["scheme", "quantity", "estimate", "ci_low", "ci_high", "unit", "n"]
# Quantities of the overview: heading, factor, decimals.
_OVERVIEW = {
    "bytes": ("MB", 1e-6, 2),
    "expert_bits": ("bits an expert weight", 1.0, 2),
    "perplexity": ("perplexity", 1.0, 3),
    "loss_difference": ("loss, difference", 1.0, 4),
    "kl": ("KL", 1.0, 4),
    "kl_from_routing": ("of it from routing", 1.0, 4),
    "same_top": ("same top token", 1.0, 4),
    "overlap": ("shared experts", 1.0, 4),
    "ttft_s": ("TTFT [ms]", 1e3, 1),
    "tpot_s": ("TPOT [ms]", 1e3, 2),
}
# Properties that distinguish stored weights, in a run's description of its model.
WEIGHTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "model": lambda model: model.get("name"),
    "revision": lambda model: model.get("revision"),
    "quantization": lambda model: (model.get("audit") or {}).get("label"),
    "checksum of the weights": lambda model: model.get("weights_checksum"),
    "adapters": lambda model: model.get("adapters") or [],
    "edits": lambda model: model.get("edits") or [],
}
_COUNTED = ("bytes", "expert_bits")
_OF_ORIGINAL = ("perplexity", "ttft_s", "tpot_s")  # measured on the original; the rest compares with it
_SMALLER_IS_BETTER = ("bytes", "expert_bits", "perplexity", "loss_difference", "kl", "ttft_s", "tpot_s")


class Pareto:
    """Schemes of one model side by side, as measured by mixlens.pareto.

    table   one row a scheme and quantity: estimate, ci_low, ci_high, unit, n; no interval for what is counted
    meta    model, the model of each scheme, documents, versions, and the machine of the speeds, "" where none was
            measured
    path    of the run directory, None in memory; it holds the run of every measurement
    """

    kind = KIND

    def __init__(self, table: pd.DataFrame, meta: dict[str, Any], *, path: Path | None = None) -> None:
        self.table, self.meta, self.path = table, meta, path

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Pareto:
        """Open the run at `path`. Raises RunError if it is missing, unfinished, or of another kind."""
        run = open_run(path, KIND, check=check)
        return cls(pq.read_table(run.file(TABLE)).to_pandas(), run.meta, path=run.path)

    @property
    def schemes(self) -> list[str]:
        """Schemes in the order given, the original first."""
        return list(self.table["scheme"].unique())

    def of(self, quantity: str) -> pd.DataFrame:
        """Return estimate, ci_low, ci_high, unit and n of one quantity by scheme.

        Raises BadInput for a quantity that was not measured.
        """
        rows = self.table[self.table["quantity"] == quantity]
        if rows.empty:
            raise BadInput(
                f"Cannot find {quantity!r}: the measured quantities are {', '.join(self.table['quantity'].unique())}. "
                "Pass one of them.",
                argument="quantity",
                value=quantity,
            )
        return rows.set_index("scheme").drop(columns="quantity")

    def exact(self, scheme: str, quantity: str) -> bool:
        """Return True for numbers without uncertainty: counts, and the original compared with itself."""
        itself = scheme == self.schemes[0] and quantity in _OVERVIEW and quantity not in _OF_ORIGINAL
        return quantity in _COUNTED or itself

    def front(self, x: str = "bytes", y: str = "kl") -> list[str]:
        """Return the schemes that no other one beats in both quantities, by their estimates; smallest x first."""
        points = pd.DataFrame({"x": _cost(self, x), "y": _cost(self, y)}).dropna().sort_values(["x", "y"])
        best, found = np.inf, []
        for scheme, point in points.iterrows():
            if point["y"] < best:
                best = point["y"]
                found.append(str(scheme))
        return found

    def with_scores(self, logs: Mapping[str, Any]) -> Pareto:
        """Return a copy with benchmark scores from {scheme: Log}.

        Raises BadInput for a scheme that was not measured, or an evaluation of different weights.
        """
        unknown = sorted(set(logs) - set(self.schemes))
        if unknown:
            raise BadInput(
                f"Cannot add scores of {', '.join(unknown)}: the measured schemes are {', '.join(self.schemes)}. Pass "
                "logs by these names.",
                argument="logs",
                value=unknown,
            )
        for scheme, log in logs.items():
            if getattr(log, "kind", None) != "eval":
                raise BadInput(
                    f"Cannot add scores to {scheme}: expected an evaluation, got a {type(log).__name__}. Pass what "
                    "ml.evaluate returns, or ml.open of its folder.",
                    argument="logs",
                    value=type(log).__name__,
                )
            self._check_same(scheme, log.meta["model"])
        rows = [
            {"scheme": scheme, "quantity": _score_name(row), "estimate": row["score"], "unit": "score"}
            | {name: row[name] for name in ("ci_low", "ci_high", "n")}
            for scheme, log in logs.items()
            for row in log.scores.to_dict("records")
        ]
        added = pd.DataFrame(rows, columns=COLUMNS)
        return Pareto(pd.concat([self.table, added], ignore_index=True), self.meta, path=self.path)

    def _check_same(self, scheme: str, evaluated: Mapping[str, Any]) -> None:
        """Raise BadInput unless an evaluation used the same weights as `scheme`."""
        measured = self.meta.get("schemes", {}).get(scheme, {})
        for what, said in WEIGHTS.items():
            one, other = said(measured), said(evaluated)
            if one != other or (what == "checksum of the weights" and not one):
                raise BadInput(
                    f"Cannot add scores to {scheme}: the evaluation used other weights: {what} is "
                    f"{other or 'unknown'}, and {one or 'unknown'} where {scheme} was measured. Evaluate the model as "
                    "it was loaded here, with the same revision and quantization.",
                    argument="logs",
                    value=what,
                )

    def overview(self) -> pd.DataFrame:
        """Return one row per scheme, as text with intervals; n/a for missing values."""
        known = [name for name in _OVERVIEW if (self.table["quantity"] == name).any()]
        scores = [name for name in self.table["quantity"].unique() if name not in _OVERVIEW]
        rows = {scheme: {} for scheme in self.schemes}
        for name in [*known, *scores]:
            heading, factor, decimals = _OVERVIEW.get(name, (name, 1.0, 3))
            for scheme, row in self.of(name).iterrows():
                exact = (
                    self.exact(str(scheme), name)
                    and row["estimate"] == row["estimate"]
                    and not row["ci_low"] < row["ci_high"]
                )
                shown = f"{factor * row['estimate']:,.{decimals}f}" if exact else interval_of(row, factor, decimals)
                rows[str(scheme)][heading] = shown
        table = pd.DataFrame.from_dict(rows, orient="index").fillna("n/a").rename_axis("scheme")
        table["on the front"] = ["yes" if scheme in self.front() else "" for scheme in table.index]
        return table

    def title(self) -> str:
        """Return a title with the model, counts and machine."""
        n = int(self.of("kl")["n"].max())
        machine = self.meta.get("machine", "")
        return (
            f"{self.meta['model']['name']} in {len(self.schemes)} schemes: {n:,} predicted tokens of "
            f"{self.meta['documents']:,} documents; 95% intervals; front: no other scheme has fewer bytes and less KL"
            + (f"; speed on {machine}" if machine else "")
        )

    def __repr__(self) -> str:
        return visible(f"{self.title()}\n{self.overview().T.to_string()}")

    def _repr_html_(self) -> str:
        return f"<div><p>{html.escape(self.title())}</p>{self.overview().to_html(escape=True, border=0)}</div>"


def _score_name(row: Mapping[str, Any]) -> str:
    """Return a unique name for a score: averages are named by protocol, others by task."""
    return f"{row['protocol']} {row['metric']} {row['average']}" if row["average"] else f"{row['task']} {row['metric']}"


def _cost(pareto: Pareto, quantity: str) -> pd.Series:
    """Return estimates by scheme, with signs chosen so that less is better."""
    estimate = pareto.of(quantity)["estimate"].astype(float)
    return estimate if quantity in _SMALLER_IS_BETTER else -estimate
