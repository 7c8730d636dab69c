"""Checks before an evaluation starts; each refuses with the reason, so that no score comes out wrong in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check(backend: Any, loaded: Any, requests: Sequence[Any]) -> None:
    """Raise BadInput, naming what fails."""
