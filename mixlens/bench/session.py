"""Session: the benchmark of one endpoint, from the plan on disk to the Bench. Several sessions can take turns."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixlens.bench.bench import RESULTS, ROUTING, Bench
from mixlens.bench.events import Record, records_bytes
from mixlens.bench.load_generator import Caps, Driver, Level
from mixlens.bench.prompts import Workload
from mixlens.bench.record_sink import Kept
from mixlens.bench.request import Sender, Timeouts
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.endpoints.endpoint import Endpoint, canonical
from mixlens.endpoints.prices import price_at
from mixlens.errors import BadInput, SourceError
from mixlens.trace.trace import Trace

_TIMEOUTS = Timeouts()


@dataclass(frozen=True)
class BenchSettings:
    """Settings for the benchmark of an endpoint.

    Parameters
    ----------
    warmup : int, optional
        Number of warm-up requests before each level, per simultaneous request of a closed loop. They are recorded and
        excluded from all metrics.
    arrivals : {"poisson", "constant"}, optional
        Arrival process of an open loop.
    timeouts : Timeouts, optional
        Timeouts of a request.
    max_seconds : float, optional
        Time in seconds after which no request starts; None for no cap.
    max_dollars : float, optional
        Maximum cost of all requests together in dollars; None for no cap.
    price : tuple[float, float], optional
        Dollars per million tokens (input, output) for `max_dollars`; None for the highest price in the price snapshot.
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
    """A monotonic clock in seconds that can be paused, to exclude the time in which other endpoints are measured."""

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
    """The benchmark of one endpoint while it runs.

    plan     parameters that determine the requests besides endpoint, workload and settings, such as the loads
    out      run directory, or None
    total    number of measured requests, for the progress bar
    opened   the Bench of a complete run of the same plan in `out`; the session then sends no request
    driver   set by `open`
    clock    clock of all time stamps of this session

    A context manager, which holds the run directory. Raises the errors of check_target, and RunError if `out` holds
    another run.
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
        self._skeleton = _skeleton_of(endpoint) if endpoint.routing else None
        kept = {k: v for k, v in asdict(settings).items() if k != "progress"}
        whole = {"endpoint": endpoint.plan(), **plan, "workload": workload.plan(), "settings": kept}
        self._held = ExitStack()
        self._writer = None if out is None else self._held.enter_context(RunWriter(out, "bench", whole))
        self._more = plan.get("measured_with", {})
        done = self._writer is not None and self._writer.complete
        self.opened = Bench.open(Path(str(out))) if done else None
        self._started, self.clock = now(), Clock()
        same = workload.reuse_prompts or workload.prompts is not None
        self._salt = "" if same else secrets.token_hex(4)
        self.caps = Caps(settings.max_seconds, settings.max_dollars, self._price)
        self.kept = None if done else self._held.enter_context(Kept(self._writer, total, show=settings.progress))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def open(self) -> Sender:
        """Create the driver and return its sender, which the caller must close."""
        assert self.kept is not None
        self._sender = sender = Sender(self._endpoint, self._settings.timeouts, self.clock)
        self.driver = Driver(sender, self._workload, self.caps, self.clock, self.kept.keep, self._salt)
        return sender

    def finish(self, *, interrupted: bool) -> Bench:
        """Complete the run directory, if there is one, and return the Bench."""
        assert self.kept is not None
        records = ordered(self.kept.records)
        meta = {
            "created": self._started,
            "model": {"name": canonical(self._endpoint.model)},
            "endpoint": self._endpoint.plan(),
            "workload": self._workload.plan(),
            "prompt_salt": self._salt,
            "price_usd_per_mtok": self._price,
            "stopped": "an interrupt" if interrupted else self.caps.stopped,
            "counts": {"requests": len(records), "succeeded": sum(r.outcome == "ok" for r in records)},
            "versions": versions("mixlens", "httpx"),
            **({"measured_with": self._more} if self._more else {}),
        }
        routing, refused = self._routing()
        meta |= {"routing": refused} if refused else {}
        path = None
        if self._writer is not None:
            folder = self._writer.path / ROUTING
            runs = [] if routing is None else [Path(str(routing.save(folder).path))]
            self._writer.finish(meta, {RESULTS: records_bytes(records)}, runs=runs)
            path = self._writer.path
        bench = Bench(records, meta, path=path, count_tokens=self._workload.count_tokens)
        bench.routing = routing
        return bench

    def _routing(self) -> tuple[Trace | None, str]:
        """Return the routing of the measured requests, or why there is none; the times are kept in any case."""
        if self._skeleton is None:
            return None, ""
        from mixlens.engines.server import answered

        kept = sorted(self._sender.routing, key=lambda pair: (pair[0].level, pair[0].index))
        if not kept:
            return None, f"{self._endpoint.host} returned none; vLLM streams none."
        about = [{"document_id": number, "level": r.level, "index": r.index} for number, (r, _) in enumerate(kept)]
        try:
            answers = [routed_answer(record, message) for record, message in kept]
            return answered(answers, about, self._endpoint, self._skeleton), ""
        except SourceError as error:
            return None, str(error)


def _skeleton_of(endpoint: Endpoint) -> Any:
    """Return the served model without weights, so that errors come before the measurement. Importing torch is slow."""
    from mixlens.engines.server import architecture_name
    from mixlens.models.load import skeleton

    return skeleton(architecture_name(endpoint, None))


def routed_answer(record: Record, message: str) -> dict[str, Any]:
    """Return the message that held routing as a complete answer; for a stream, with the last reported token counts."""
    answer = json.loads(message)
    if record.form == "json":
        return answer
    counts = {
        name: getattr(event, name)
        for event in record.events
        for name in ("input_tokens", "output_tokens")
        if getattr(event, name) is not None
    }
    choices = [{k: v for k, v in choice.items() if k != "token_ids"} for choice in answer.get("choices") or []]
    usage = {"prompt_tokens": counts.get("input_tokens"), "completion_tokens": counts.get("output_tokens")}
    return {**answer, "choices": choices, "usage": usage}


def measure(sessions: Sequence[Session], schedule: Callable[[], Coroutine[Any, Any, None]]) -> list[Bench]:
    """Run `schedule`, which drives the sessions. An interrupt is raised again once the runs are saved."""

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
    """Return the requested loads. Raises BadInput for an invalid load."""
    slots = [concurrency] if isinstance(concurrency, int) else list(concurrency or [])
    rates = [rate] if isinstance(rate, int | float) else list(rate or [])
    if concurrency is None and rate is None:
        slots = [1]
    fine = all(isinstance(n, int) and n >= 1 for n in slots) and all(0 < r < float("inf") for r in rates)
    distinct = len({*slots}) == len(slots) and len({*rates}) == len(rates)
    if not (slots or rates) or not fine or not distinct or arrivals not in ("poisson", "constant"):
        raise BadInput(
            f"Cannot benchmark at concurrency {concurrency} and rate {rate} ({arrivals}): a load is invalid or "
            'repeated. Pass distinct integers from 1 or distinct rates above 0, and arrivals="poisson" or "constant".',
            argument="arrivals"
            if arrivals not in ("poisson", "constant")
            else "concurrency"
            if rate is None
            else "rate",
        )
    return [Level(concurrency=n) for n in slots] + [Level(rate=float(r), arrivals=arrivals) for r in rates]


def check_requests(requests: int, settings: BenchSettings) -> None:
    """Raise BadInput for an invalid number of requests, cap, price or timeout."""
    if not isinstance(requests, int) or requests < 1 or settings.warmup < 0:
        raise BadInput(
            f"Cannot benchmark {requests} requests after {settings.warmup} warm-up requests. Pass at least 1 request "
            "and 0 or more warm-up requests.",
            argument="requests",
            value=(requests, settings.warmup),
        )
    limits = {"max_seconds": settings.max_seconds, "max_dollars": settings.max_dollars, **vars(settings.timeouts)}
    wrong = {name: value for name, value in limits.items() if value is not None and not value > 0}
    if settings.price is not None and not (len(settings.price) == 2 and all(p >= 0 for p in settings.price)):
        wrong["price"] = settings.price
    for name, value in wrong.items():
        raise BadInput(
            f"Cannot benchmark with {name}={value}: the value is out of range. Pass a number above 0 (for price, two "
            "prices from 0 in dollars per million input and output tokens), or omit it.",
            argument=name,
            value=value,
        )


def check_target(endpoint: Endpoint, workload: Workload, settings: BenchSettings) -> tuple[float, float] | None:
    """Return the price for the cap on cost, after checking the target before anything is written or sent.

    Raises BadInput for a target that is not an endpoint, a missing key, a cap in dollars without a price, and prompts
    that exceed the context together with their answers.
    """
    if not isinstance(endpoint, Endpoint) or not isinstance(workload, Workload):
        raise BadInput(
            f"Cannot benchmark {type(endpoint).__name__} with {type(workload).__name__} under load: only an Endpoint "
            "serves simultaneous requests. Pass an Endpoint and one Workload, or measure a loaded model in batches "
            "with ml.benchmark.",
            argument="endpoint",
            value=type(endpoint).__name__,
        )
    price = settings.price or price_at(endpoint)
    if settings.max_dollars is not None and price is None:
        raise BadInput(
            f"Cannot cap the cost at ${settings.max_dollars:g}: the price snapshot has no entry for {endpoint.model} "
            f"at {endpoint.host}. Pass the price in dollars per million tokens, as in BenchSettings(price=(0.54, "
            "0.54)) or --price 0.54,0.54.",
            argument="max_dollars",
            value=settings.max_dollars,
        )
    tokens = workload.output_tokens + (workload.prompt_tokens if workload.prompts is None else 0)
    if endpoint.context is not None and tokens > endpoint.context:
        raise BadInput(
            f"Cannot request prompts and answers of {tokens} tokens in total from {endpoint.host}: the context of "
            f"{endpoint.model} is {endpoint.context} tokens. Use a shorter prompt or answer.",
            argument="context",
            value=tokens,
        )
    endpoint.key()
    return price


def ordered(records: Sequence[Record]) -> list[Record]:
    """Sort records by load in the order of measurement, warm-up first."""
    names = list(dict.fromkeys(record.level for record in records))
    return sorted(records, key=lambda r: (names.index(r.level), r.phase != "warm-up", r.index))


def _run(drive: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], object]) -> bool:
    """Run to the end, even in a notebook with a running event loop; return False after an interrupt."""
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
