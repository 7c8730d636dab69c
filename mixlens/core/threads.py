"""Thread pools for array work; numpy and scipy release the GIL."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MOST = 8  # each thread holds its own arrays
_worker = threading.local()


def cores() -> int:
    """Return the number of cores available to this process: its affinity, capped by OMP_NUM_THREADS."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(bound, int(asked) if asked.isdecimal() else bound, _MOST))


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Map `function` over items on all cores, in order; sequentially when called from such a thread."""
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
    """Yield items while a thread prepares the next one."""
    if cores() < 2 or getattr(_worker, "busy", False):
        yield from items
        return
    rest, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, rest, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, rest, end)
            yield item  # type: ignore[misc]
