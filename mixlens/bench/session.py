"""Session: one endpoint while it is measured, from its plan on disk to its Bench; several can take turns."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixlens.bench.bench import RESULTS, Bench
from mixlens.bench.events import Record, write_records
from mixlens.bench.load_generator import Caps, Driver, Level
from mixlens.bench.prompts import Workload
from mixlens.bench.record_sink import PARTIAL, Kept, bench_writer
from mixlens.bench.request import Sender, Timeouts
from mixlens.core.run_dir import now, versions
from mixlens.endpoints.endpoint import Endpoint, canonical
from mixlens.endpoints.prices import price_at
from mixlens.errors import BadInput

_TIMEOUTS = Timeouts()


@dataclass(frozen=True)
class BenchSettings:
    """Settings of how an endpoint is benchmarked.

    Parameters
    ----------
    warmup : int, optional
        Requests before each level that are kept and never counted, for each place of a closed loop.
    arrivals : str, optional
        Of an open loop: "poisson" or "constant".
    timeouts : Timeouts, optional
        Of a request.
    max_seconds : float, optional
        After which no request starts; None for no cap.
    max_dollars : float, optional
        That all requests together may cost; None for no cap.
    price : tuple[float, float], optional
        Dollars per million tokens (in, out), for that cap; None for the dearest in the snapshot of prices.
    progress : bool, optional
        Whether to show a progress bar.

    Examples
    --------
    >>> ml.bench.BenchSettings(warmup=2).warmup
    2
    """

    warmup: int = 1
    arrivals: str = "poisson"
    timeouts: Timeouts = _TIMEOUTS
    max_seconds: float | None = 600.0
    max_dollars: float | None = None
    price: tuple[float, float] | None = None
    progress: bool = True


class Clock:
    """Seconds of a monotonic clock that can stand still, so that time in which others are measured does not count."""

    def __init__(self) -> None:
        self._zero, self._stood_at = time.perf_counter(), None

    def __call__(self) -> float:
        return (time.perf_counter() if self._stood_at is None else self._stood_at) - self._zero

    def stop(self) -> None:
        self._stood_at = time.perf_counter() if self._stood_at is None else self._stood_at

    def go_on(self) -> None:
        if self._stood_at is not None:
            self._zero += time.perf_counter() - self._stood_at
            self._stood_at = None


class Session:
    """One endpoint while it is measured.

    plan     what decides the requests besides endpoint, workload and settings, such as the loads
    out      run directory, or None
    total    measured requests, for the progress bar
    opened   the Bench of a complete run of the same plan that is there already; nothing is to be sent then
    driver   there from `open` on
    clock    of every stamp of this session

    Raises as check_target, and RunError when `out` holds something else.
    """

    driver: Driver

    def __init__(
        self,
        endpoint: Endpoint,
        plan: dict[str, Any],
        *,
        out: str | os.PathLike[str] | None,
        workload: Workload,
        settings: BenchSettings,
        total: int,
    ) -> None:
        self._endpoint, self._workload, self._settings = endpoint, workload, settings
        self._price = check_target(endpoint, workload, settings)
        kept = {k: v for k, v in asdict(settings).items() if k != "progress"}
        whole = {"endpoint": endpoint.plan(), **plan, "workload": workload.plan(), "settings": kept}
        self._writer = None if out is None else bench_writer(Path(out), whole)
        self._more = plan.get("measured_with", {})
        done = self._writer is not None and self._writer.complete
        self.opened = Bench.open(Path(str(out))) if done else None
        self._started, self.clock = now(), Clock()
        self.caps = Caps(settings.max_seconds, settings.max_dollars, self._price)
        self.kept = None if done else Kept(self._writer, total, show=settings.progress)

    def open(self) -> Sender:
        """The sender that the driver uses; to be closed by the caller."""
        assert self.kept is not None
        sender = Sender(self._endpoint, self._settings.timeouts, self.clock)
        self.driver = Driver(sender, self._workload, self.caps, self.clock, self.kept.keep)
        return sender

    def finish(self, *, interrupted: bool) -> Bench:
        """What was measured, complete on disk where there is a run directory."""
        assert self.kept is not None
        records = ordered(self.kept.records)
        meta = {
            "created": self._started,
            "model": {"name": canonical(self._endpoint.model)},
            "endpoint": self._endpoint.plan(),
            "workload": self._workload.plan(),
            "price_usd_per_mtok": self._price,
            "stopped": "an interrupt" if interrupted else self.caps.stopped,
            "counts": {"requests": len(records), "succeeded": sum(r.outcome == "ok" for r in records)},
            "versions": versions("mixlens", "httpx"),
            **({"measured_with": self._more} if self._more else {}),
        }
        path = None
        if self._writer is not None:
            self._writer.finish(meta, {RESULTS: lambda path: write_records(path, records)})
            (self._writer.path / PARTIAL).unlink(missing_ok=True)
            path = self._writer.path
        return Bench(records, meta, path=path, count_tokens=self._workload.count_tokens)


def measure(sessions: Sequence[Session], schedule: Callable[[], Coroutine[Any, Any, None]]) -> list[Bench]:
    """Run `schedule`, which drives the sessions, to its end; an interrupt leaves runs that open, and is raised."""
    with ExitStack() as files:
        for session in sessions:
            assert session.kept is not None
            files.enter_context(session.kept)

        async def drive() -> None:
            async with AsyncExitStack() as senders:
                for session in sessions:
                    await senders.enter_async_context(session.open())
                await schedule()

        interrupted = not _run(drive, lambda: [session.caps.interrupt.set() for session in sessions])
    benches = [session.finish(interrupted=interrupted) for session in sessions]
    if interrupted:
        raise KeyboardInterrupt
    return benches


def levels_of(
    concurrency: int | Sequence[int] | None, rate: float | Sequence[float] | None, arrivals: str
) -> list[Level]:
    """The loads that were asked for. Raises BadInput for what is none."""
    slots = [concurrency] if isinstance(concurrency, int) else list(concurrency or [])
    rates = [rate] if isinstance(rate, int | float) else list(rate or [])
    if concurrency is None and rate is None:
        slots = [1]
    fine = all(isinstance(n, int) and n >= 1 for n in slots) and all(0 < r < float("inf") for r in rates)
    distinct = len({*slots}) == len(slots) and len({*rates}) == len(rates)
    if not (slots or rates) or not fine or not distinct or arrivals not in ("poisson", "constant"):
        raise BadInput(
            f"Cannot benchmark at concurrency {concurrency} and rate {rate} ({arrivals}). Pass whole numbers from 1, "
            'or rates above 0, each once, and arrivals="poisson" or "constant".',
            argument="arrivals"
            if arrivals not in ("poisson", "constant")
            else "concurrency"
            if rate is None
            else "rate",
        )
    return [Level(concurrency=n) for n in slots] + [Level(rate=float(r), arrivals=arrivals) for r in rates]


def check_requests(requests: int, settings: BenchSettings) -> None:
    """Raises BadInput for a number of requests, a cap, a price or a timeout that is none."""
    if not isinstance(requests, int) or requests < 1 or settings.warmup < 0:
        raise BadInput(
            f"Cannot benchmark {requests} requests after {settings.warmup} warm-up requests: needs at least 1 "
            "request, and 0 or more warm-up requests. Pass larger numbers.",
            argument="requests",
            value=(requests, settings.warmup),
        )
    limits = {"max_seconds": settings.max_seconds, "max_dollars": settings.max_dollars, **vars(settings.timeouts)}
    wrong = {name: value for name, value in limits.items() if value is not None and not value > 0}
    if settings.price is not None and not (len(settings.price) == 2 and all(p >= 0 for p in settings.price)):
        wrong["price"] = settings.price
    for name, value in wrong.items():
        raise BadInput(
            f"Cannot benchmark with {name}={value}: not a limit or a price. Pass a number above 0 (price: dollars per "
            "million tokens in and out), or leave it out.",
            argument=name,
            value=value,
        )


def check_target(endpoint: Endpoint, workload: Workload, settings: BenchSettings) -> tuple[float, float] | None:
    """The price that caps reckon with; before anything is written or sent.

    Raises BadInput for what is no endpoint, a missing key, a cap in dollars without a price, and prompts that with
    their answers are longer than the context.
    """
    if not isinstance(endpoint, Endpoint) or not isinstance(workload, Workload):
        raise BadInput(
            f"Cannot benchmark a {type(endpoint).__name__} with a {type(workload).__name__} under load: only an "
            "endpoint serves several requests at a time. Pass an Endpoint and one Workload; for a loaded model, "
            "ml.benchmark measures batches.",
            argument="endpoint",
            value=type(endpoint).__name__,
        )
    price = settings.price or price_at(endpoint)
    if settings.max_dollars is not None and price is None:
        raise BadInput(
            f"Cannot cap the cost at ${settings.max_dollars:g}: the price snapshot has no entry for {endpoint.model} "
            f"at {endpoint.host}. Pass dollars per million tokens, as in BenchSettings(price=(0.54, 0.54)) or --price "
            "0.54,0.54.",
            argument="max_dollars",
            value=settings.max_dollars,
        )
    tokens = workload.output_tokens + (workload.prompt_tokens if workload.prompts is None else 0)
    if endpoint.context is not None and tokens > endpoint.context:
        raise BadInput(
            f"Cannot request prompts and answers of {tokens} tokens together from {endpoint.host}: the context of "
            f"{endpoint.model} there is {endpoint.context}. Pass smaller lengths.",
            argument="context",
            value=tokens,
        )
    endpoint.key()
    return price


def ordered(records: Sequence[Record]) -> list[Record]:
    """By load in the order they were measured, warm-up first."""
    names = list(dict.fromkeys(record.level for record in records))
    return sorted(records, key=lambda r: (names.index(r.level), r.phase != "warm-up", r.index))


def _run(drive: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], object]) -> bool:
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
