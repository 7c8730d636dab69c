"""Several statistics of a trace, computed in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput
from mixlens.stats.clusters import By
from mixlens.stats.counts import in_one_pass
from mixlens.stats.domains import domain_information, domain_specialization
from mixlens.stats.inputs import require
from mixlens.stats.routing import (
    expert_share,
    load_balance,
    load_entropy,
    position_profile,
    router_confidence,
    routing_entropy,
)
from mixlens.stats.structure import coactivation, repetition, transitions
from mixlens.stats.tokens import predictability, vocabulary_specialization

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_STATISTICS: dict[str, Callable[..., xr.Dataset]] = {
    statistic.__name__: statistic
    for statistic in (
        coactivation,
        domain_information,
        domain_specialization,
        expert_share,
        load_balance,
        load_entropy,
        position_profile,
        predictability,
        repetition,
        router_confidence,
        routing_entropy,
        transitions,
        vocabulary_specialization,
    )
}


def compute(
    trace: Trace,
    statistics: Sequence[str],
    *,
    by: By = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
    executor: str | None = None,
) -> dict[str, xr.Dataset]:
    """Compute several statistics of a trace in one pass over it.

    The results equal those of the functions of the same names, bit for bit. Reading the trace only once matters on disk
    or over a network. ``predictability`` and ``vocabulary_specialization`` need several passes and make their own.

    Parameters
    ----------
    trace : Trace
        The recording.
    statistics : Sequence[str]
        Names of functions of `ml.stats` that take a trace and `by`, such as "expert_share" and "coactivation".
    by : By, optional
        Column or columns of the sequences to group by; statistics of domains use "domain" by default.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.
    executor : str, optional
        joblib backend that processes the shards of a trace on disk: "loky" for local processes, "dask", or a registered
        one such as "ray" and "spark". The numbers are the same, bit for bit.

    Returns
    -------
    dict[str, xarray.Dataset]
        Results by name, in the order of `statistics`.

    Raises
    ------
    BadInput
        If a name or a joblib backend is unknown, or as the statistics do.
    MissingSignal
        If the trace lacks a signal that one of them needs.

    Examples
    --------
    >>> found = ml.stats.compute(trace, ["expert_share", "coactivation"])
    >>> found["coactivation"]["estimate"].dims
    ('layer', 'expert', 'expert_j')
    """
    require(trace, "statistics", bootstrap=bootstrap)
    names: list[Any] = list(statistics) if isinstance(statistics, list | tuple) else [statistics]
    unknown = [name for name in names if not isinstance(name, str) or name not in _STATISTICS]
    if unknown or not names:
        raise BadInput(
            f"Cannot compute {', '.join(map(str, unknown)) or 'no statistics'}: the statistics that are "
            f"computed together are {', '.join(_STATISTICS)}. Pass some of their names.",
            argument="statistics",
            value=statistics,
        )
    if executor is not None:
        trace = copy.copy(trace)
        trace.executor = _known(executor)
    options: dict[str, Any] = {"cluster": cluster, "bootstrap": bootstrap, **({} if by is None else {"by": by})}
    return in_one_pass(trace, {name: partial(_STATISTICS[name], trace, **options) for name in names})


def _known(executor: str) -> str:
    import joblib

    try:
        with joblib.parallel_config(backend=executor):
            return executor
    except (ValueError, ImportError, TypeError) as error:
        raise BadInput(
            f"Cannot compute with executor={executor!r}: {str(error).strip().rstrip('.')}. Pass the name of a backend "
            'that joblib knows, such as "loky", and register others first, as ray.util.joblib.register_ray() does.',
            argument="executor",
            value=executor,
        ) from error
