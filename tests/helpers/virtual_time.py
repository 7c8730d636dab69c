"""An event loop whose seconds pass only when everybody waits, and a server whose times are given."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from helpers.inside import Job, Record
from helpers.streams import timed


class _Selector(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout=None):
        if timeout:
            self.now += timeout
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.passing = _Selector()
        super().__init__(self.passing)

    def time(self) -> float:
        return self.passing.now


def in_no_time(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What a coroutine gives, however long it sleeps."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work())


def clock() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Server:
    """Answers each request after `takes(job)` seconds; keeps when each began and how many there were at a time."""

    takes: Callable[[Job], float] = lambda job: 1.0
    jobs: list[Job] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    active: int = 0
    most: int = 0

    async def send(self, job: Job) -> Record:
        self.jobs.append(job)
        self.began.append(clock())
        self.active += 1
        self.most = max(self.most, self.active)
        await asyncio.sleep(self.takes(job))
        self.active -= 1
        made = timed(0, 0.5, 0.1)
        return replace(made, index=job.index, level=job.level, phase=job.phase, scheduled_s=job.scheduled_s)
