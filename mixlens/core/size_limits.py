"""Limits on the size of untrusted files, checked before they are read, so that none can fill the memory.

A JSON value takes up to a hundred bytes in memory, and the footer of a Parquet file twenty times its size.
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
# Compression ratio beyond that of any text, checked above a size.
_MOST_RATIO, _UNSUSPICIOUS_BYTES = 100, 64 << 20
_VALUES = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{,]', re.DOTALL)


class Oversized(ValueError):
    """A file or value exceeds a size limit; the message says which one."""


def json_value(text: str, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON. Raises Oversized if it is too large, otherwise errors as json.loads."""
    if len(text) > MOST_CHARS:
        raise Oversized(f"it is longer than {MOST_CHARS:,} characters")
    if sum(map(text.count, "[{,")) > _MOST_VALUES and _values(text) > _MOST_VALUES:
        raise Oversized(f"it has more than {_MOST_VALUES:,} values")
    return json.loads(text, parse_constant=parse_constant)


def _values(text: str) -> int:
    """Return an upper bound on the number of values, ignoring the contents of strings."""
    return sum(not found[0].startswith('"') for found in _VALUES.finditer(text))


def bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a file. Raises Oversized for a line longer than MOST_CHARS."""
    while line := file.readline(MOST_CHARS + 1):
        if len(line) > MOST_CHARS:
            raise Oversized(f"it is longer than {MOST_CHARS:,} characters")
        yield line


def check_safetensors(path: str | PathLike[str]) -> None:
    """Raise Oversized if the header of a safetensors file is implausibly large."""
    with open(path, "rb") as file:
        _check_header(int.from_bytes(file.read(8), "little"))


def check_parquet(file: BinaryIO) -> None:
    """Raise Oversized if the metadata of a Parquet file are implausibly large."""
    file.seek(0, 2)
    file.seek(max(file.tell() - 8, 0))
    _check_header(int.from_bytes(file.read(4), "little"))
    file.seek(0)


def check_unpacked(packed_bytes: int, unpacked_bytes: int) -> None:
    """Raise Oversized if decompressed data have outgrown the compression ratio of any text."""
    if unpacked_bytes > _UNSUSPICIOUS_BYTES and unpacked_bytes > _MOST_RATIO * packed_bytes:
        raise Oversized(f"{packed_bytes:,} compressed bytes expand to over {unpacked_bytes:,}, more than any text does")


def _check_header(size: int) -> None:
    if size > _MOST_HEADER_BYTES:
        raise Oversized(f"its header has {size:,} bytes, above the limit of {_MOST_HEADER_BYTES:,}")
