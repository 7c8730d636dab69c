"""All statistics of one trace that its signals allow, as the basis of a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr

from mixlens import stats
from mixlens.errors import BadInput, MissingSignal
from mixlens.trace.trace import Trace

_Compute = Callable[[Trace], xr.Dataset]
_BY_DOMAIN: dict[str, _Compute] = {
    "expert_share by domain": lambda trace: stats.expert_share(trace, by="domain"),
    "repetition by domain": lambda trace: stats.repetition(trace, by="domain"),
    "domain_specialization": lambda trace: stats.domain_specialization(trace, by="domain"),
    "domain_information": lambda trace: stats.domain_information(trace, by="domain"),
}
_MOST_SHUFFLED = 100_000  # tokens; a few seconds


def _repetition_beyond_tokens(trace: Trace) -> xr.Dataset:
    """At the first, the middle and the last layer, which is where published figures stand."""
    if trace.n_tokens > _MOST_SHUFFLED:
        raise BadInput(
            f"Cannot shuffle {trace.n_tokens:,} tokens for a report: it takes minutes. Compute "
            'ml.stats.null_model(trace, ml.stats.repetition, given="token") by itself.',
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
    """The statistics of a trace by name, and the error messages that explain why others are missing."""

    name: str
    trace: Trace
    found: dict[str, xr.Dataset]
    missing: dict[str, str]

    @property
    def has_domains(self) -> bool:
        return has_domains(self.trace)

    @property
    def n_documents(self) -> int:
        return int(self.trace.sequences["document_id"].nunique())


def analyse(trace: Trace, name: str) -> Analysis:
    """Compute every statistic once; list those whose signal is missing, with the reason."""
    found, missing = {}, {}
    for statistic, compute in {**(_BY_DOMAIN if has_domains(trace) else {}), **_WHOLE}.items():
        try:
            found[statistic] = compute(trace)
        except (MissingSignal, BadInput) as error:
            missing[statistic] = str(error)
        else:
            if lacking := found[statistic].attrs.get("missing"):
                missing[f"part of {statistic}"] = f"{lacking}."
    if not has_domains(trace):
        missing["statistics by domain"] = (
            "They need a column `domain` in the sequences, with at least two values and none missing. "
            f"The columns are {', '.join(map(str, trace.sequences.columns))}."
        )
    return Analysis(name, trace, found, missing)


def has_domains(trace: Trace) -> bool:
    column = trace.sequences.get("domain")
    return column is not None and bool(column.notna().all()) and column.nunique() > 1
