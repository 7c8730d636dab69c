"""Errors are tested by their type and by what they name, never by their wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mixlens.errors import MixlensError

ANYTHING = object()


@contextmanager
def refused(
    kind: type[MixlensError], argument: str | None = None, value: object = ANYTHING
) -> Iterator[pytest.ExceptionInfo[MixlensError]]:
    """The block raises exactly this kind of error, which names this argument and, if given, this value."""
    with pytest.raises(kind) as caught:
        yield caught
    assert type(caught.value) is kind
    assert caught.value.argument == argument
    if value is not ANYTHING:
        assert caught.value.value == value
