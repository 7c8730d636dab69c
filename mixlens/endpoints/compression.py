"""Decompression of answers in pieces of bounded size: gzip, deflate, br and zstd, at most two of them nested.

httpx decompresses each received chunk at once, and 64 kB of a brotli or zstd bomb expand to gigabytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from mixlens.endpoints.limits import MAX_STREAM_BYTES, TooLarge

_PIECE_BYTES = 1 << 16
_MOST_CODINGS = 2
# A zstd block of 4 bytes expands to up to 128 KiB, and zstandard does not limit its output.
_ZSTD_SLICE_BYTES = 64
_ZSTD_WINDOW_BYTES = 8 << 20  # maximum for an HTTP content coding (RFC 9659)

Step = Callable[[bytes], Iterator[bytes]]


class Decompressor:
    """Decompressor for the codings of a Content-Encoding header; `feed` yields pieces of at most 2 MiB.

    Raises ValueError if a coding is unknown, not installed or nested too deeply, or if the data is invalid; TooLarge if
    any step produces more than MAX_STREAM_BYTES.
    """

    def __init__(self, header: str) -> None:
        codings = [name.strip() for name in header.split(",")]
        codings = [name for name in codings if name.lower() not in ("", "identity")]
        if len(codings) > _MOST_CODINGS:
            raise ValueError(f"the answer is compressed {len(codings)} times")
        if unknown := [name for name in codings if name.lower() not in _CODINGS]:
            # Quoted unchanged and in full, so that a key in it can be masked later.
            raise ValueError(f"the answer is compressed as {unknown[0]!r}, although identity was asked for")
        self._steps = [_counted(_CODINGS[name.lower()]()) for name in reversed(codings)]

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield the decompressed content of a piece of the answer."""
        pieces = iter([piece])
        for step in self._steps:
            pieces = _through(step, pieces)
        return pieces


def _through(step: Step, pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield from step(piece)


def _counted(step: Step) -> Step:
    total = 0

    def counted(piece: bytes) -> Iterator[bytes]:
        nonlocal total
        for out in step(piece):
            total += len(out)
            if total > MAX_STREAM_BYTES:
                raise TooLarge(f"the answer decompresses to more than {MAX_STREAM_BYTES:,} bytes")
            yield out

    return counted


def _zlib(window: int) -> Step:
    """Return a step that inflates consecutive members and ignores any other data after the first."""
    current, ended = zlib.decompressobj(window), False

    def step(piece: bytes) -> Iterator[bytes]:
        nonlocal current, ended
        full = False
        while piece or full:
            try:
                out = current.decompress(piece, _PIECE_BYTES)
            except zlib.error as error:
                if ended:
                    return
                raise ValueError(f"the answer cannot be decompressed: {error}") from None
            full, piece = len(out) == _PIECE_BYTES, current.unconsumed_tail
            if current.eof:
                ended, full, piece, current = True, False, current.unused_data, zlib.decompressobj(window)
            if out:
                yield out

    return step


def _gzip() -> Step:
    return _zlib(16 + zlib.MAX_WBITS)


def _deflate() -> Step:
    """Return a step for deflate with or without a zlib header, which servers may omit."""
    head, inner = b"", None

    def step(piece: bytes) -> Iterator[bytes]:
        nonlocal head, inner
        if inner is None:
            head += piece
            if len(head) < 2:
                return
            wrapped = head[0] & 15 == zlib.DEFLATED and int.from_bytes(head[:2]) % 31 == 0
            inner, piece = _zlib(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS), head
        yield from inner(piece)

    return step


def _brotli() -> Step:
    try:
        import brotli  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("the answer is compressed as br, which needs pip install 'brotli>=1.2'") from None
    current = brotli.Decompressor()

    def step(piece: bytes) -> Iterator[bytes]:
        try:
            while out := current.process(piece, output_buffer_limit=_PIECE_BYTES):
                piece = b""
                yield out
        except brotli.error as error:
            raise ValueError(f"the answer cannot be decompressed: {error}") from None

    return step


def _zstd() -> Step:
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("the answer is compressed as zstd, which needs pip install zstandard") from None
    fresh = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj
    current = fresh()

    def step(piece: bytes) -> Iterator[bytes]:
        nonlocal current
        for start in range(0, len(piece), _ZSTD_SLICE_BYTES):
            rest = piece[start : start + _ZSTD_SLICE_BYTES]
            while rest:
                try:
                    out = current.decompress(rest)
                except zstandard.ZstdError as error:
                    raise ValueError(f"the answer cannot be decompressed: {error}") from None
                rest = b""
                if current.eof:
                    rest, current = current.unused_data, fresh()
                if out:
                    yield out

    return step


_CODINGS: dict[str, Callable[[], Step]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
