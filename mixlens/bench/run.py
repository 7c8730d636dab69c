"""benchmark: load an endpoint, keep every request, and say how fast it was."""

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
    from mixlens.bench.local import LocalSettings


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
    """Measure how fast an endpoint answers, or a loaded model generates, under one load after another.

    Nothing is tried again: a request that fails is counted by kind. Every request is on disk as soon as it has ended.

    Parameters
    ----------
    target : Endpoint or Any
        An Endpoint, or a model as ml.load gives it; see mixlens.bench.local for what is measured of a model.
    concurrency : int or Sequence[int], optional
        Closed loop: so many requests at a time; 1 when neither this nor a rate is given. Of a model: rows of a
        batch.
    rate : float or Sequence[float], optional
        Open loop: so many requests a second, whether or not the earlier ones are done.
    requests : int, optional
        Measured requests of each load.
    out : str or os.PathLike, optional
        Run directory; None keeps the records in memory. A complete run of the same plan there is opened, and
        nothing is sent.
    workload : Workload or Sequence[Workload], optional
        Prompts and lengths; of a model one or several.
    settings : BenchSettings or LocalSettings, optional
        BenchSettings of an endpoint, LocalSettings of a model.

    Returns
    -------
    Bench

    Raises
    ------
    BadInput
        For a load that cannot be, for a missing key, or for a cap in dollars without a price.
    RunError
        If `out` holds something else or a benchmark that was killed.

    Examples
    --------
    >>> settings = ml.bench.LocalSettings(progress=False, warmup=0, recording=False)
    >>> bench = ml.benchmark(model, requests=1, workload=ml.bench.Workload(16, 2), settings=settings)
    >>> bench.succeeded
    1
    """
    if not isinstance(target, Endpoint):
        from mixlens.bench.local import benchmark_model

        if rate is not None:
            raise BadInput(
                f"Cannot benchmark a loaded model at {rate} requests per second: it generates one batch after the "
                "other, and no requests arrive. Pass concurrency=, or serve the model and benchmark an Endpoint.",
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
            "endpoint takes BenchSettings and one Workload. Pass these, or benchmark a loaded model.",
            argument="settings" if not isinstance(settings, BenchSettings) else "workload",
        )
    levels = levels_of(concurrency, rate, settings.arrivals)
    check_requests(requests, settings)
    session = Session(
        target,
        {"levels": [asdict(level) for level in levels], "requests": requests},
        out=out,
        workload=workload,
        settings=settings,
        total=len(levels) * requests,
    )
    if session.opened is not None:
        return session.opened
    [bench] = measure([session], lambda: session.driver.run(levels, requests, settings.warmup))
    return bench
