"""benchmark: measure the speed of an endpoint or a loaded model under one or several loads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mixlens.bench.bench import Bench
from mixlens.bench.prompts import Workload
from mixlens.bench.session import BenchSettings, Session, check_requests, levels_of, measure
from mixlens.endpoints.endpoint import Endpoint
from mixlens.errors import BadInput

_WORKLOAD = Workload()

if TYPE_CHECKING:
    from mixlens.bench.local_loads import LocalSettings


def benchmark(
    target: Endpoint | Any,
    *,
    concurrency: int | Sequence[int] | None = None,
    rate: float | Sequence[float] | None = None,
    requests: int = 32,
    out: str | os.PathLike[str] | None = None,
    workload: Workload | Sequence[Workload] = _WORKLOAD,
    settings: BenchSettings | LocalSettings | None = None,
) -> Bench:
    """Measure how fast an endpoint answers or a loaded model generates.

    The loads run one after the other. Failed requests are never retried; the result counts them by kind. Every record
    is written to disk as soon as its request ends.

    Parameters
    ----------
    target : Endpoint or model
        An Endpoint, or a model from ml.load. :mod:`mixlens.bench.local` explains the measurements of a model.
    concurrency : int or Sequence[int], optional
        Closed loop: number of simultaneous requests, or rows per batch for a model. The default is 1 if `rate` is not
        given either.
    rate : float or Sequence[float], optional
        Open loop: requests per second, sent regardless of whether earlier requests have finished. Endpoints only.
    requests : int, optional
        Number of measured requests per load.
    out : str or os.PathLike, optional
        Run directory; None keeps the records in memory. If the directory already holds a complete run of the same
        plan, that run is opened and no request is sent.
    workload : Workload or Sequence[Workload], optional
        Prompts and lengths. A model accepts several workloads, an endpoint one.
    settings : BenchSettings or LocalSettings, optional
        BenchSettings for an endpoint, LocalSettings for a model.

    Returns
    -------
    Bench

    Raises
    ------
    BadInput
        If a load is invalid, the key is missing, or a cap in dollars is set without a known price.
    RunError
        If `out` holds another run, or another process writes to it.

    Examples
    --------
    >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
    >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
    >>> bench.succeeded
    1
    """
    if not isinstance(target, Endpoint):
        from mixlens.bench.local import benchmark_model
        from mixlens.engines.vllm_engine import VLLM

        if isinstance(target, VLLM):
            raise BadInput(
                f"Cannot benchmark {target!r} in this process: it answers whole batches here, without the times of "
                "single tokens. Serve the model with `vllm serve`, and benchmark an ml.Endpoint.",
                argument="target",
                value=type(target).__name__,
            )
        if rate is not None:
            raise BadInput(
                f"Cannot benchmark a loaded model at {rate} requests per second: it generates one batch after the "
                "other, so requests have no arrival rate. Pass concurrency=, or serve the model and benchmark an "
                "Endpoint.",
                argument="rate",
                value=rate,
            )
        return benchmark_model(
            target, batch=concurrency, requests=requests, out=out, workload=workload, settings=settings
        )
    settings = BenchSettings() if settings is None else settings
    if not isinstance(settings, BenchSettings) or not isinstance(workload, Workload):
        raise BadInput(
            f"Cannot benchmark {target.model} with {type(settings).__name__} and {type(workload).__name__}: an "
            "endpoint needs BenchSettings and a single Workload. Pass these, or benchmark a loaded model.",
            argument="settings" if not isinstance(settings, BenchSettings) else "workload",
        )
    levels = levels_of(concurrency, rate, settings.arrivals)
    check_requests(requests, settings)
    with Session(
        target,
        {"levels": [asdict(level) for level in levels], "requests": requests},
        out=out,
        workload=workload,
        settings=settings,
        total=len(levels) * requests,
    ) as session:
        if session.opened is not None:
            return session.opened
        [bench] = measure([session], lambda: session.driver.run(levels, requests, settings.warmup))
    return bench
