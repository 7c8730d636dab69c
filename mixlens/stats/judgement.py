"""Judgement of a changed model: its losses on held-out text and benchmarks against the user's limits, worst first."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import xarray as xr

from mixlens.core.run_dir import open_run
from mixlens.core.text import interval_of
from mixlens.errors import BadInput, visible
from mixlens.stats.verdicts import DO, fewest_units, level_of_each, of_all, verdict

KIND, TABLE = "judgement", "table.parquet"
# Kinds of rows, with unit and the sign that turns a change into a gain.
TEXT, SCORE = "loss", "score"
_GAIN = {TEXT: -1.0, SCORE: 1.0}
_UNIT = {TEXT: "nats per token", SCORE: "of the score"}
PUBLISHED = (
    "Published experience, by other protocols: Mixtral 8x7B without 2 of its 8 experts lost about 2.9 points on "
    "average, without 4 about 7.1 (Lu et al. 2024, arXiv 2402.14800); with the 5 % least used experts of "
    "Qwen3.5-35B-A3B set to zero, perplexity on WikiText-2 rose from 6.6 to 86.9 "
    "(baa.ai/articles/44-expert-pruning-destructive, March 2026). "
    "What was cheap elsewhere says little here."
)


@dataclass(frozen=True)
class Judgement:
    """Two models on the same held-out text and questions, as compared by `judge`.

    Parameters
    ----------
    table : pandas.DataFrame
        One row a group of documents and a subject, the worst of each kind first, their mean last: kind ("loss" or
        "score"), group, before, after, estimate (after less before: a loss that rises is worse, a score that falls),
        ci_low, ci_high (which hold for all rows at once; NaN for too few), n (documents or questions), mean.
    limits : Mapping[str, float]
        How far a "loss" (nats per token) may rise, and a "score" fall, in any group.
    meta : dict[str, Any]
        Both models, settings, versions, and the simultaneous level of the intervals.
    path : Path, optional
        The run directory; None in memory.
    """

    table: pd.DataFrame
    limits: Mapping[str, float]
    meta: dict[str, Any]
    path: Path | None = None

    kind = KIND

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Judgement:
        """Open the judgement in a folder. Raises RunError if there is none, or a run of another kind.

        Parameters
        ----------
        path : str or os.PathLike
            The folder.
        check : bool, optional
            Verify the checksum of each file when it is first read; False verifies sizes only.
        """
        run = open_run(path, KIND, check=check)
        return cls(pq.read_table(run.file(TABLE)).to_pandas(), run.meta["limits"], run.meta, Path(path))

    def within(self, limits: Mapping[str, float]) -> Judgement:
        """Return the same measurement judged by other limits.

        Parameters
        ----------
        limits : Mapping[str, float]
            As for judge.
        """
        check_limits(limits, self.table["kind"].unique())
        return Judgement(self.table, limits, self.meta, self.path)

    @property
    def verdicts(self) -> list[str]:
        """Verdict of each row of the table: whether its loss is within the limit."""
        found = []
        for row in self.table.to_dict("records"):
            gain = sorted(_GAIN[row["kind"]] * row[name] for name in ("ci_low", "ci_high"))
            found.append(verdict(*gain, needed=-self.limits[row["kind"]]))
        return found

    @property
    def verdict(self) -> str:
        """ "do it" if every row is within its limit, "do not" if one exceeds it, else "not enough evidence"."""
        return of_all(self.verdicts)

    @property
    def data(self) -> xr.Dataset:
        """The table as a Dataset: estimate, ci_low, ci_high, before, after, n [row], kind and group as coordinates."""
        columns = {name: ("row", self.table[name].to_numpy()) for name in self.table if name not in ("kind", "group")}
        coords = {name: ("row", self.table[name].to_numpy(object)) for name in ("kind", "group")}
        attrs = {"verdict": self.verdict, "reason": self.reason, "level": self.meta["level"]}
        return xr.Dataset(columns, coords, attrs)

    @property
    def reason(self) -> str:
        """The decisive row, in one sentence."""
        decides = self.verdict
        rows = zip(self.table.to_dict("records"), self.verdicts, strict=True)
        row = next((row for row, found in rows if found == decides), None)
        if row is None:
            return "Nothing was measured."
        kind = row["kind"]
        most = "; of all groups this is the worst" if decides == DO else ""
        return (
            f"{decides.capitalize()}: the {kind} of {row['group']} changes by {interval_of(row, 1.0, 4)}, and may "
            f"{'rise' if kind == TEXT else 'fall'} by {self.limits[kind]:g} {_UNIT[kind]}{most}."
        )

    def overview(self) -> pd.DataFrame:
        """Return the table as text, with the verdict of each row."""
        rows = [
            {
                "": row["kind"],
                "group": row["group"],
                "before": f"{row['before']:.3f}",
                "after": f"{row['after']:.3f}",
                "change": interval_of(row, 1.0, 4),
                "limit": f"{-_GAIN[row['kind']] * self.limits[row['kind']]:+g}",
                "n": f"{row['n']:,}",
                "verdict": found,
            }
            for row, found in zip(self.table.to_dict("records"), self.verdicts, strict=True)
        ]
        return pd.DataFrame(rows)

    def remarks(self) -> list[str]:
        """Return notes on the table: how it was measured, and published experience."""
        before, after = (self.meta[side].get("name", "") for side in ("before", "after"))
        level, rows = self.meta["level"], len(self.table)
        return [
            f"Before: {before}; after: {after}. Changes on the same tokens and questions, the worst group first; "
            f"{level:.0%} intervals that hold for all {rows} rows at once (Bonferroni). A row of fewer than "
            f"{fewest_units(level_of_each(level, rows))} documents or questions has no interval: all of so "
            "few may change in one direction by chance.",
            PUBLISHED,
        ]

    def __repr__(self) -> str:
        return visible("\n".join([self.reason, "", self.overview().to_string(index=False), "", *self.remarks()]))

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(text)}</p>" for text in self.remarks())
        table = self.overview().to_html(escape=True, border=0, index=False)
        return f"<div><p><b>{html.escape(visible(self.reason))}</b></p>{table}{notes}</div>"


def check_limits(limits: Mapping[str, float], kinds: Iterable[str]) -> None:
    """Raise BadInput if a kind has no limit."""
    for kind in kinds:
        limit = limits.get(kind)
        if not isinstance(limit, int | float) or not limit >= 0:
            raise BadInput(
                f"Cannot judge a {kind} without a limit: limits has {dict(limits)}. Pass how far it may "
                f'{"rise, in nats per token" if kind == TEXT else "fall, as a fraction"}: limits={{"{kind}": 0.02}}.',
                argument="limits",
                value=limit,
            )
