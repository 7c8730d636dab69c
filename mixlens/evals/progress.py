"""Progress of an evaluation: a bar on stderr, or a function of the caller."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# (requests answered, total requests)
Progress = Callable[[int, int], None]


@contextmanager
def reporting(progress: bool | Progress) -> Iterator[Progress]:
    """Yield a function to call with (done, total) at the start and after every batch; its exceptions are not caught.

    progress  True for a bar, shown from the first call; False for none; or the function
    """
    if callable(progress):
        yield progress
        return
    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            options = {"desc": "evaluate", "unit": "request", "disable": not progress, "file": sys.stderr}
            bars.append(tqdm(total=total, initial=done, **options))
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()
