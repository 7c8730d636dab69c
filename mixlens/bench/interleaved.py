"""benchmark_together: several endpoints under the same loads, in turns, so that what drifts drifts for all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mixlens.bench.bench import Bench
from mixlens.bench.load_generator import Level, turn_edges
from mixlens.bench.prompts import Workload
from mixlens.bench.session import BenchSettings, Session, check_requests, check_target, levels_of, measure
from mixlens.core.run_dir import META
from mixlens.endpoints.endpoint import Endpoint
from mixlens.errors import BadInput

# Turns that each endpoint has at a load: enough that a drift falls on all, few enough that a turn is a load.
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
    """Benchmark several endpoints in turns on the same prompts: never two at once, and none always first.

    At each load every endpoint has four turns of a quarter of its requests, and who begins changes from turn to turn.
    The clock of an endpoint stands still while others are measured. When one meets a cap all end, so that requests
    stay in pairs. `compare` then pairs requests of the same number, which had the same prompt.

    Parameters
    ----------
    endpoints : Mapping[str, Endpoint]
        By the name that their results get.
    concurrency, rate, requests, workload, settings : int or Sequence[int], optional
        As of `benchmark`; caps hold for each endpoint.
    out : str or os.PathLike, optional
        Folder for one run directory a name; None keeps the records in memory.

    Returns
    -------
    dict[str, Bench]
        A Bench by name.

    Raises
    ------
    BadInput
        For fewer than two endpoints, or a name that is no folder name.

    Examples
    --------
    >>> benches = ml.bench.benchmark_together({"a": ml.Endpoint(...), "b": ml.Endpoint(...)})  # doctest: +SKIP
    """
    names = list(endpoints)
    if len(names) < 2 or any(not name or Path(name).name != name for name in names):
        raise BadInput(
            f"Cannot benchmark the endpoints {', '.join(map(repr, names)) or '(none)'} together: there are fewer than "
            "two, or a name cannot be the name of a folder. Pass a dict of two or more, as {'a': Endpoint(...), "
            "...}.",
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
            f"Cannot benchmark endpoints together in {out}: it holds some of them already, measured without the "
            "others. Pass another folder.",
            argument="out",
            value=str(out),
        )
    plan = {"levels": [asdict(level) for level in levels], "requests": requests}
    total = len(levels) * requests
    made = {}
    # Folders that are there may hold another run: that is found before a new one is made.
    for name in sorted(names, key=lambda name: not (out is not None and (Path(out) / name).exists())):
        others = {"names": names, "name": name, "turns": _TURNS, "requests": requests}
        made[name] = Session(
            endpoints[name],
            plan | {"measured_with": others},
            out=folders[name],
            workload=workload,
            settings=settings,
            total=total,
        )
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
