"""How far an evaluation is: a bar on stderr, or the caller's own function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# (requests answered, requests in all)
Progress = Callable[[int, int], None]


@contextmanager
def reporting(progress: bool | Progress) -> Iterator[Progress]:
    """What to call with (done, total), at the start and after every batch; whatever it raises ends the evaluation.

    progress  True for a bar, which stands there from the first call on; False for nothing; or the function itself
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
