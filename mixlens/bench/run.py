"""benchmark: load an endpoint, keep every request, and say how fast it was."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixlens.bench.bench import RESULTS, Bench
from mixlens.bench.drive import Caps, Driver, Level
from mixlens.bench.events import Record, write_records
from mixlens.bench.prices import price_at
from mixlens.bench.prompts import Workload
from mixlens.bench.request import Sender, Timeouts
from mixlens.errors import BadInput, RunError
from mixlens.models.endpoint import Endpoint, canonical
from mixlens.runs import PLAN, RunWriter, now, versions

# Every request as it ends, for a run that is killed; gone when the run is complete.
PARTIAL = "results.partial.jsonl"
_TIMEOUTS, _WORKLOAD = Timeouts(), Workload()


@dataclass(frozen=True)
class BenchSettings:
    """How a benchmark runs.

    warmup       requests before each level that are kept and never counted, for each place of a closed loop
    arrivals     of an open loop: "poisson" or "constant"
    timeouts     of a request
    max_seconds  after which no request starts; None for no cap
    max_dollars  that all requests together may cost; None for no cap
    price        dollars per million tokens (in, out), for that cap; None for the dearest in the snapshot of prices
    progress     whether to show a progress bar
    """

    warmup: int = 1
    arrivals: str = "poisson"
    timeouts: Timeouts = _TIMEOUTS
    max_seconds: float | None = 600.0
    max_dollars: float | None = None
    price: tuple[float, float] | None = None
    progress: bool = True


_SETTINGS = BenchSettings()


def benchmark(
    endpoint: Endpoint,
    *,
    concurrency: int | Sequence[int] | None = None,
    rate: float | Sequence[float] | None = None,
    requests: int = 32,
    out: str | os.PathLike | None = None,
    workload: Workload = _WORKLOAD,
    settings: BenchSettings = _SETTINGS,
) -> Bench:
    """How fast an endpoint answers, under one load after the other.

    concurrency  closed loop: so many requests at a time; 1 when neither this nor a rate is given
    rate         open loop: so many requests a second, whether or not the earlier ones are done
    requests     measured requests of each load
    out          run directory; None keeps the records in memory. A complete run of the same plan there is opened, and
                 nothing is sent
    workload     prompts and lengths

    Nothing is tried again: a request that fails is counted by kind. Every request is on disk as soon as it has ended.

    Raises BadInput for a load that cannot be, for a missing key, or for a cap in dollars without a price; RunError when
    `out` holds something else or a benchmark that was killed.
    """
    levels = _levels(concurrency, rate, settings.arrivals)
    price = settings.price or price_at(endpoint)
    _check(requests, settings, price)
    plan = {
        "endpoint": endpoint.plan(),
        "levels": [asdict(level) for level in levels],
        "requests": requests,
        "workload": workload.plan(),
        "settings": {k: v for k, v in asdict(settings).items() if k != "progress"},
    }
    writer = None if out is None else _writer(Path(out), plan)
    if writer is not None and writer.complete:
        return Bench.open(writer.path)
    started, zero = now(), time.perf_counter()
    caps = Caps(settings.max_seconds, settings.max_dollars, price)

    def clock() -> float:
        return time.perf_counter() - zero

    with _Kept(writer, len(levels) * requests, show=settings.progress) as kept:

        async def drive() -> None:
            async with Sender(endpoint, settings.timeouts, clock) as sender:
                await Driver(sender, workload, caps, clock, kept.keep).run(levels, requests, settings.warmup)

        interrupted = not _run(drive, caps.interrupt.set)
    meta = {
        "created": started,
        "model": {"name": canonical(endpoint.model)},
        "endpoint": endpoint.plan(),
        "price_usd_per_mtok": price,
        "stopped": "an interrupt" if interrupted else caps.stopped,
        "counts": {"requests": len(kept.records), "succeeded": sum(r.outcome == "ok" for r in kept.records)},
        "versions": versions("mixlens", "httpx"),
    }
    records = _ordered(kept.records, levels)
    if writer is not None:
        writer.finish(meta, {RESULTS: lambda path: write_records(path, records)})
        (writer.path / PARTIAL).unlink(missing_ok=True)
    if interrupted:
        raise KeyboardInterrupt
    return Bench(records, meta, path=writer and writer.path, count_tokens=workload.count_tokens)


class _Kept:
    """Records as they come: in memory, one line each on disk, one step each of the bar."""

    def __init__(self, writer: RunWriter | None, total: int, *, show: bool) -> None:
        self.records: list[Record] = []
        self._file = None if writer is None else (writer.path / PARTIAL).open("w", encoding="utf-8")
        self._bar = tqdm(total=total, desc="benchmark", unit="request", disable=not show, file=sys.stderr)

    def keep(self, record: Record) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(record.to_json() + "\n")
            self._file.flush()
        self._bar.update(record.phase == "measured")

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()


def _run(drive: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], None]) -> bool:
    """Run to the end, also inside a notebook, whose own loop is running already; False when it was interrupted."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        try:
            asyncio.run(drive())
        except KeyboardInterrupt:
            return False
        return True
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: asyncio.run(drive()))
        try:
            done.result()
        except KeyboardInterrupt:
            stop()
            done.result()
            return False
    return True


def _levels(
    concurrency: int | Sequence[int] | None, rate: float | Sequence[float] | None, arrivals: str
) -> list[Level]:
    slots = [concurrency] if isinstance(concurrency, int) else list(concurrency or [])
    rates = [rate] if isinstance(rate, int | float) else list(rate or [])
    if concurrency is None and rate is None:
        slots = [1]
    fine = all(isinstance(n, int) and n >= 1 for n in slots) and all(0 < r < float("inf") for r in rates)
    distinct = len({*slots}) == len(slots) and len({*rates}) == len(rates)
    if not (slots or rates) or not fine or not distinct or arrivals not in ("poisson", "constant"):
        raise BadInput(
            f"A benchmark at concurrency {concurrency} and rate {rate} ({arrivals}) was asked for. That is no load. "
            'Give whole numbers from 1, or rates above 0, each once, and arrivals "poisson" or "constant".'
        )
    return [Level(concurrency=n) for n in slots] + [Level(rate=float(r), arrivals=arrivals) for r in rates]


def _check(requests: int, settings: BenchSettings, price: tuple[float, float] | None) -> None:
    if requests < 1 or settings.warmup < 0:
        raise BadInput(
            f"A benchmark of {requests} requests after {settings.warmup} of warm-up was asked for. There must be at "
            "least 1, after 0 or more. Give larger numbers."
        )
    if settings.max_dollars is not None and price is None:
        raise BadInput(
            f"A cap of ${settings.max_dollars:g} was asked for. The snapshot of prices has none for this endpoint and "
            "model. Give dollars per million tokens, as in BenchSettings(price=(0.54, 0.54))."
        )


def _writer(path: Path, plan: dict[str, Any]) -> RunWriter:
    killed = (path / PLAN).exists() and (path / PARTIAL).exists()
    writer = RunWriter(path, "bench", plan)
    if killed and not writer.complete:
        n = len((path / PARTIAL).read_bytes().splitlines())
        raise RunError(
            f"A benchmark was to be written to {path}. One that was killed after {n} requests is there, and "
            f"time cannot be resumed. Read its requests from {PARTIAL}, and give another folder."
        )
    return writer


def _ordered(records: Sequence[Record], levels: Sequence[Level]) -> list[Record]:
    names = [level.name for level in levels]
    return sorted(records, key=lambda r: (names.index(r.level), r.phase != "warm-up", r.index))
