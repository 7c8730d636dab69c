"""Hooks do not fire in code that torch.compile made before they were there, so such code runs eagerly under them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Stance:
    """Counts who needs hooks to fire, since they may leave in any order."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.stance: Any = None

    def enter(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.stance = torch.compiler.set_stance("force_eager")
                self.stance.__enter__()

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.stance.__exit__(None, None, None)


_stance = _Stance()


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code runs as the Python that it was compiled from."""
    _stance.enter()
    try:
        yield
    finally:
        _stance.leave()
