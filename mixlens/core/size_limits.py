"""What a piece of a file may amount to before it is read: one that is refused must not fill the memory.

A value of JSON takes up to a hundred bytes in memory, and the footer of a Parquet file twenty times its size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from os import PathLike
from typing import IO, Any, AnyStr, BinaryIO

MOST_CHARS = 32 << 20
_MOST_VALUES = 1_000_000
_MOST_HEADER_BYTES = 8 << 20
# Whatever compresses better than text does, from a size on.
_MOST_RATIO, _UNSUSPICIOUS_BYTES = 100, 64 << 20
_VALUES = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{,]', re.DOTALL)


class Oversized(ValueError):
    """Something is larger than anything honest; the message says by what."""


def json_value(text: str, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """A value of JSON. Raises Oversized for one that is too large, else as json.loads."""
    if len(text) > MOST_CHARS:
        raise Oversized(f"it is longer than {MOST_CHARS:,} characters")
    if sum(map(text.count, "[{,")) > _MOST_VALUES and _values(text) > _MOST_VALUES:
        raise Oversized(f"it has more than {_MOST_VALUES:,} values")
    return json.loads(text, parse_constant=parse_constant)


def _values(text: str) -> int:
    """How many values there are at most, not counting what stands within strings."""
    return sum(not found[0].startswith('"') for found in _VALUES.finditer(text))


def bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file. Raises Oversized for one longer than MOST_CHARS."""
    while line := file.readline(MOST_CHARS + 1):
        if len(line) > MOST_CHARS:
            raise Oversized(f"it is longer than {MOST_CHARS:,} characters")
        yield line


def check_safetensors(path: str | PathLike[str]) -> None:
    """Raise Oversized for a file in the format of safetensors with a header beyond any honest one."""
    with open(path, "rb") as file:
        _check_header(int.from_bytes(file.read(8), "little"))


def check_parquet(file: BinaryIO) -> None:
    """Raise Oversized for a Parquet file with metadata beyond any honest ones."""
    file.seek(0, 2)
    file.seek(max(file.tell() - 8, 0))
    _check_header(int.from_bytes(file.read(4), "little"))
    file.seek(0)


def check_unpacked(packed_bytes: int, unpacked_bytes: int) -> None:
    """Raise Oversized for what has grown beyond what any text does."""
    if unpacked_bytes > _UNSUSPICIOUS_BYTES and unpacked_bytes > _MOST_RATIO * packed_bytes:
        raise Oversized(f"{packed_bytes:,} compressed bytes are more than {unpacked_bytes:,}, as no text's are")


def _check_header(size: int) -> None:
    if size > _MOST_HEADER_BYTES:
        raise Oversized(f"its header has {size:,} bytes, and at most {_MOST_HEADER_BYTES:,} are read")
