"""benchmark_together: measure several endpoints under the same loads in turns, so that drift affects all alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from mixlens.bench.bench import Bench
from mixlens.bench.load_generator import Level, turn_edges
from mixlens.bench.prompts import Workload
from mixlens.bench.session import BenchSettings, Session, check_requests, check_target, levels_of, measure
from mixlens.core.run_dir import META
from mixlens.endpoints.endpoint import Endpoint
from mixlens.errors import BadInput

# Turns per endpoint and load: enough to spread drift over all endpoints, few enough that each turn is a real load.
_TURNS = 4
_WORKLOAD, _SETTINGS = Workload(), BenchSettings()


def benchmark_together(
    endpoints: Mapping[str, Endpoint],
    *,
    concurrency: int | Sequence[int] | None = None,
    rate: float | Sequence[float] | None = None,
    requests: int = 32,
    out: str | os.PathLike[str] | None = None,
    workload: Workload = _WORKLOAD,
    settings: BenchSettings = _SETTINGS,
) -> dict[str, Bench]:
    """Benchmark several endpoints in turns.

    At each load every endpoint has four turns with a quarter of its requests each. Only one endpoint is measured at a
    time, and the order rotates from turn to turn. The clock of an endpoint pauses while others are measured. If one
    endpoint reaches a cap, all stop, so that requests remain paired. `ml.compare` pairs the requests with the same
    number, whose prompts have the same length. Generated prompts differ between endpoints, because two addresses may
    share a prefix cache.

    Parameters
    ----------
    endpoints : Mapping[str, Endpoint]
        Endpoints by name; the results use the same names.
    concurrency : int or Sequence[int], optional
        Number of simultaneous requests (closed loop), as in `ml.benchmark`.
    rate : float or Sequence[float], optional
        Requests per second (open loop), as in `ml.benchmark`.
    requests : int, optional
        Number of measured requests per load and endpoint.
    out : str or os.PathLike, optional
        Folder for one run directory per name; None keeps the records in memory.
    workload : Workload, optional
        Prompts and lengths.
    settings : BenchSettings, optional
        Settings of the benchmark. Caps apply to each endpoint separately.

    Returns
    -------
    dict[str, Bench]
        One Bench per name.

    Raises
    ------
    BadInput
        If there are fewer than two endpoints, a name is not a valid folder name, or `out` holds some of the endpoints
        and not the others.

    Examples
    --------
    >>> benches = ml.bench.benchmark_together({"a": ml.Endpoint(...), "b": ml.Endpoint(...)})  # doctest: +SKIP
    """
    names = list(endpoints)
    if len(names) < 2 or any(not name or Path(name).name != name for name in names):
        raise BadInput(
            f"Cannot benchmark the endpoints {', '.join(map(repr, names)) or '(none)'} together: there are fewer than "
            "two, or a name is not a valid folder name. Pass a dict of two or more, such as {'a': Endpoint(...), "
            "'b': Endpoint(...)}.",
            argument="endpoints",
            value=names,
        )
    levels = levels_of(concurrency, rate, settings.arrivals)
    check_requests(requests, settings)
    for endpoint in endpoints.values():
        check_target(endpoint, workload, settings)
    folders = {name: None if out is None else Path(out) / name for name in names}
    there = [folder is not None and (folder / META).exists() for folder in folders.values()]
    if any(there) and not all(there):
        raise BadInput(
            f"Cannot benchmark endpoints together in {out}: it already holds runs of some endpoints, measured without "
            "the others. Pass another folder.",
            argument="out",
            value=str(out),
        )
    plan = {"levels": [asdict(level) for level in levels], "requests": requests}
    total = len(levels) * requests
    made: dict[str, Session] = {}
    with ExitStack() as held:
        # Existing folders come first: if one holds another run, Session raises before it creates new folders.
        for name in sorted(names, key=lambda name: not (out is not None and (Path(out) / name).exists())):
            others = {"names": names, "name": name, "turns": _TURNS, "requests": requests}
            session = Session(
                endpoints[name],
                plan | {"measured_with": others},
                out=folders[name],
                workload=workload,
                settings=settings,
                total=total,
            )
            made[name] = held.enter_context(session)
        sessions = [made[name] for name in names]
        if all(there):
            return {name: session.opened for name, session in zip(names, sessions, strict=True) if session.opened}
        for session in sessions:
            session.clock.stop()
        benches = measure(sessions, lambda: _in_turns(sessions, levels, requests, settings.warmup))
        return dict(zip(names, benches, strict=True))


async def _in_turns(sessions: Sequence[Session], levels: Sequence[Level], requests: int, warmup: int) -> None:
    def met() -> bool:
        return any(session.caps.stopped for session in sessions)

    edges = turn_edges(requests, _TURNS)
    for level in levels:
        for session in sessions:
            if met():
                return
            session.clock.go_on()
            await session.driver.warm_up(level, warmup)
            session.clock.stop()
        for turn in range(_TURNS):
            numbers = range(edges[turn], edges[turn + 1])
            for at in range(len(sessions)):
                session = sessions[(turn + at) % len(sessions)]
                if met():
                    return
                if not numbers:
                    continue
                session.clock.go_on()
                await session.driver.part(level, numbers)
                session.clock.stop()
