"""Compute all statistics of a trace that its signals allow, for a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import xarray as xr

from mixlens import stats
from mixlens.errors import BadInput, MissingSignal
from mixlens.trace.trace import Trace

_Compute = Callable[[Trace], xr.Dataset]
_BY_GROUP: dict[str, Callable[..., xr.Dataset]] = {
    "expert_share by group": stats.expert_share,
    "repetition by group": stats.repetition,
    "domain_specialization": stats.domain_specialization,
    "domain_information": stats.domain_information,
}
_MOST_GROUPS = 20  # values of a column that is taken for groups unasked
_MOST_SHUFFLED = 100_000  # tokens; a few seconds


def _repetition_beyond_tokens(trace: Trace) -> xr.Dataset:
    """Test repetition at the first, middle and last layer, those of the published figures."""
    if trace.n_tokens > _MOST_SHUFFLED:
        raise BadInput(
            f"Cannot shuffle {trace.n_tokens:,} tokens for a report: this takes minutes. Compute "
            'ml.stats.null_model(trace, ml.stats.repetition, given="token") separately.',
            argument="trace",
            value=trace.n_tokens,
        )
    n = trace.n_layers
    trace = trace.select(layers=[int(trace.layers[i]) for i in sorted({0, (n - 1) // 2, n - 1})])
    return stats.null_model(trace, stats.repetition, given="token", permutations=59)


_WHOLE: dict[str, _Compute] = {
    "expert_share": stats.expert_share,
    "load_balance": stats.load_balance,
    "routing_entropy": stats.routing_entropy,
    "router_confidence": stats.router_confidence,
    "repetition": stats.repetition,
    "repetition beyond tokens": _repetition_beyond_tokens,
    "coactivation": stats.coactivation,
    "transitions": stats.transitions,
    "position_profile": stats.position_profile,
    "vocabulary_specialization": stats.vocabulary_specialization,
    "predictability": stats.predictability,
}


@dataclass(frozen=True)
class Analysis:
    """The statistics of a trace by name, and error messages that explain missing ones."""

    name: str
    trace: Trace
    found: dict[str, xr.Dataset]
    missing: dict[str, str]
    by: str | None = None  # column of the groups

    @property
    def n_documents(self) -> int:
        return int(self.trace.sequences["document_id"].nunique())


def analyse(trace: Trace, name: str, by: str | None = None) -> Analysis:
    """Compute every statistic once, some by the groups of column `by`; list those that cannot be, with the reason.

    Without `by`, the groups are domains, or else the first column whose few values several documents share.
    """
    if by is not None and not _has_groups(trace, by):
        raise BadInput(
            f"Cannot group the report by {by!r}: it takes a column of the documents with at least two values and none "
            f"missing. The columns are {', '.join(map(str, trace.sequences.columns))}.",
            argument="by",
            value=by,
        )
    by = by or _groups_of(trace)
    found, missing = {}, {}
    grouped = {} if by is None else {statistic: partial(compute, by=by) for statistic, compute in _BY_GROUP.items()}
    for statistic, compute in {**grouped, **_WHOLE}.items():
        try:
            found[statistic] = compute(trace)
            if statistic in grouped:
                found[statistic].attrs["group"] = by
        except (MissingSignal, BadInput) as error:
            missing[statistic] = str(error)
        else:
            if lacking := found[statistic].attrs.get("missing"):
                missing[f"part of {statistic}"] = f"{lacking}."
    if by is None:
        missing["statistics by group"] = (
            "They need a column of the documents with at least two values and none missing, such as `domain`. "
            f"The columns are {', '.join(map(str, trace.sequences.columns))}."
        )
    return Analysis(name, trace, found, missing, by)


def _groups_of(trace: Trace) -> str | None:
    if _has_groups(trace, "domain"):
        return "domain"
    columns = [str(name) for name in trace.sequences if name not in ("document_id", "length")]
    most = min(_MOST_GROUPS, len(trace.sequences) // 2)
    return next((c for c in columns if _has_groups(trace, c) and trace.sequences[c].nunique() <= most), None)


def _has_groups(trace: Trace, name: str) -> bool:
    column = trace.sequences.get(name)
    return column is not None and bool(column.notna().all()) and column.nunique() > 1
