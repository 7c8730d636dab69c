"""Work on arrays shared out over the cores of this process: numpy and scipy let threads compute at the same time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MOST = 8  # each holds arrays of its own
_worker = threading.local()


def cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where OMP_NUM_THREADS says so."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(bound, int(asked) if asked.isdecimal() else bound, _MOST))


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """`function` of each item, in order, computed on all cores; one after the other within such a thread."""
    every = list(items)
    workers = min(cores(), len(every))
    if workers < 2 or getattr(_worker, "busy", False):
        return [function(item) for item in every]

    def work(item: _Item) -> _Result:
        _worker.busy = True
        return function(item)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, every))


def ahead(items: Iterable[_Item]) -> Iterator[_Item]:
    """Each item, while the one after it is made in a thread of its own."""
    if cores() < 2 or getattr(_worker, "busy", False):
        yield from items
        return
    rest, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, rest, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, rest, end)
            yield item  # type: ignore[misc]
