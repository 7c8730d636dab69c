"""Load generators: a closed loop of given concurrency or an open loop of given rate, within caps."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import median

from mixlens.bench.events import Record
from mixlens.bench.metrics import output_tokens, request_table
from mixlens.bench.prompts import Workload
from mixlens.bench.request import Job, Sender

Keep = Callable[[Record], None]


@dataclass(frozen=True)
class Level:
    """A load: a number of simultaneous requests (closed loop) or a rate of requests per second (open loop)."""

    concurrency: int | None = None
    rate: float | None = None
    arrivals: str = "poisson"

    @property
    def name(self) -> str:
        return f"{self.arrivals} {self.rate:g}/s" if self.rate else f"concurrency {self.concurrency}"

    def due(self, n: int, seed: int) -> list[float]:
        """Return when n requests of an open loop are due, in seconds after the start; the first is due at 0."""
        assert self.rate
        if self.arrivals == "constant":
            return [i / self.rate for i in range(n)]
        draw, at, times = random.Random(f"{seed} {self.name}"), 0.0, []
        for _ in range(n):
            times.append(at)
            at += draw.expovariate(self.rate)
        return times


def turn_edges(requests: int, turns: int) -> list[int]:
    """Split requests into turns: the number of the first request of each turn, then the total."""
    return [round(i * requests / turns) for i in range(turns + 1)]


@dataclass
class Caps:
    """Caps on the time and cost of a run.

    A request starts only if its worst case fits within the caps; a request that has started runs to its end.

    seconds  time after which no request starts; None for no cap
    dollars  maximum cost of all requests together; None for no cap
    price    dollars per million input and output tokens; required for a cap on dollars
    """

    seconds: float | None = None
    dollars: float | None = None
    price: tuple[float, float] | None = None
    spent_usd: float = 0.0
    stopped: str | None = None
    interrupt: threading.Event = field(default_factory=threading.Event)

    def admit(self, job: Job, now_s: float) -> float | None:
        """Return the dollars reserved for a request, or None if it must not start; `stopped` then holds the reason."""
        if self.stopped is not None:
            return None
        if self.interrupt.is_set():
            self.stopped = "interrupted"
        elif self.seconds is not None and now_s >= self.seconds:
            self.stopped = f"the cap of {self.seconds:g} seconds"
        elif self.dollars is not None:
            worst = self._worst_usd(job)
            if self.spent_usd + worst > self.dollars:
                self.stopped = f"the cap of ${self.dollars:g}"
            else:
                self.spent_usd += worst
                return worst
        return None if self.stopped else 0.0

    def settle(self, set_aside_usd: float, record: Record) -> None:
        """Replace the reserved amount by the actual cost of the request, if known."""
        if self.dollars is None or self.price is None:
            return
        row = request_table([record]).iloc[0]
        if row["cost_usd"] == row["cost_usd"]:
            cost = float(row["cost_usd"])
        elif record.outcome in ("http", "connect", "tls"):
            cost = 0.0
        elif row["input_tokens"] == row["input_tokens"] and record.outcome == "ok":
            cost = (row["input_tokens"] * self.price[0] + output_tokens(record)[0] * self.price[1]) / 1e6
        else:
            return
        self.spent_usd += cost - set_aside_usd

    def _worst_usd(self, job: Job) -> float:
        # A text has at most one token per byte; 64 tokens are added for the chat template.
        assert self.price is not None
        return ((len(job.prompt.encode()) + 64) * self.price[0] + job.max_tokens * self.price[1]) / 1e6


@dataclass
class Driver:
    """Sends the requests of each level in turn and passes each record to `keep` when its request ends."""

    sender: Sender
    workload: Workload
    caps: Caps
    clock: Callable[[], float]
    keep: Keep
    salt: str = ""
    _number: Iterator[int] = field(default_factory=count)
    _took_s: dict[str, list[float]] = field(default_factory=dict)  # durations of warm-up requests by load

    async def run(self, levels: Sequence[Level], requests: int, warmup: int) -> None:
        """Send the warm-up requests and then `requests` measured requests of each level."""
        for level in levels:
            await self.warm_up(level, warmup)
            await self.part(level, range(requests))

    async def warm_up(self, level: Level, warmup: int) -> None:
        """Send `warmup` requests per simultaneous request of a closed loop."""
        slots = level.concurrency or 1
        await self._closed(self._jobs(level, "warm-up", range(warmup * slots)), slots)

    async def part(self, level: Level, numbers: range) -> None:
        """Send the measured requests with these numbers; an open loop sends them when due, the first immediately."""
        jobs = self._jobs(level, "measured", numbers)
        if level.rate:
            due = level.due(numbers.stop, self.workload.seed)[numbers.start :]
            await self._open(jobs, [at - due[0] for at in due])
        else:
            # Starting all slots at once would queue them for the first prefill, which happens nowhere else in the run.
            took = self._took_s.get(level.name)
            await self._closed(jobs, level.concurrency or 1, ramp_s=median(took) if took else 0.0)

    async def _closed(self, jobs: list[Job], slots: int, *, ramp_s: float = 0.0) -> None:
        """Keep `slots` requests in flight, starting the first ones evenly over `ramp_s` seconds."""
        waiting = iter(jobs)

        async def worker(after_s: float) -> None:
            await asyncio.sleep(after_s)
            for job in waiting:
                if not await self._one(job):
                    return

        async with asyncio.TaskGroup() as group:
            for place in range(min(slots, len(jobs))):
                group.create_task(worker(ramp_s * place / slots))

    async def _open(self, jobs: list[Job], due: list[float]) -> None:
        start = self.clock()
        async with asyncio.TaskGroup() as group:
            for job, after in zip(jobs, due, strict=True):
                await asyncio.sleep(max(start + after - self.clock(), 0.0))
                if self.caps.stopped:
                    return
                group.create_task(self._one(Job(**{**vars(job), "scheduled_s": start + after})))

    async def _one(self, job: Job) -> bool:
        set_aside = self.caps.admit(job, self.clock())
        if set_aside is None:
            return False
        record = await self.sender.send(job)
        self.caps.settle(set_aside, record)
        if job.phase == "warm-up" and record.outcome == "ok":
            self._took_s.setdefault(job.level, []).append(record.ended_s - record.started_s)
        self.keep(record)
        return True

    def _jobs(self, level: Level, phase: str, numbers: range) -> list[Job]:
        return [
            Job(i, level.name, phase, self.workload.prompt(next(self._number), self.salt), self.workload.output_tokens)
            for i in numbers
        ]
