"""Parser of server-sent events, each stamped with the arrival time of its last byte."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixlens.endpoints.limits import MAX_BODY_BYTES, TooLarge

_LINE_END = re.compile(rb"\r\n|\r|\n")
# Memory overhead of a line.
_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Message:
    """One comment or event of a stream.

    at_s     arrival time in seconds of the byte that completed it
    comment  True for a comment line
    event    name of the event, "" if it has none
    data     data lines joined by newlines, or the text of a comment
    """

    at_s: float
    comment: bool
    event: str
    data: str


class SSEParser:
    """Incremental parser of an event stream (WHATWG HTML, section 9.2).

    Bytes may be split anywhere. Lines end in CR, LF or CRLF; a CR ends its line at once, so that no event waits for a
    line feed that may never come. `feed` returns the messages that a piece of the stream completes; incomplete messages
    are dropped.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[str] = []
        self._size = 0  # of the event that has begun
        self._event = ""
        self._after_cr = False
        self._first = True

    def feed(self, piece: bytes, at_s: float) -> list[Message]:
        """Return the messages completed by `piece`, which arrived at `at_s`.

        Raises TooLarge if an event grows beyond MAX_BODY_BYTES.
        """
        if not piece:
            return []
        rest = piece[1:] if self._after_cr and piece.startswith(b"\n") else piece
        self._after_cr = piece.endswith(b"\r")
        messages: list[Message] = []
        *ended, rest = _LINE_END.split(rest)
        for end in ended:
            self._line += end
            line = bytes(self._line)
            self._line.clear()
            messages += self._end_of(line, at_s)
        self._line += rest
        self._check(self._size + len(self._line))
        return messages

    def close(self, at_s: float) -> list[Message]:
        """Return the last event of an ended stream if only its blank line is missing, which some servers omit."""
        if self._line or not self._data:
            return []
        return self._end_of(b"", at_s)

    def _end_of(self, line: bytes, at_s: float) -> list[Message]:
        if self._first:
            line, self._first = line.removeprefix(b"\xef\xbb\xbf"), False
        if not line:
            return self._dispatch(at_s)
        text = line.decode("utf-8", errors="replace")
        if text.startswith(":"):
            return [Message(at_s, True, "", text[1:].removeprefix(" "))]
        field, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
            self._size += len(value) + _LINE_BYTES
            self._check(self._size)
        elif field == "event":
            self._event = value
        return []

    def _dispatch(self, at_s: float) -> list[Message]:
        event, data = self._event, self._data
        self._event, self._data, self._size = "", [], 0
        return [Message(at_s, False, event, "\n".join(data))] if data else []

    @staticmethod
    def _check(size: int) -> None:
        if size > MAX_BODY_BYTES:
            raise TooLarge(f"an event of the stream is longer than {MAX_BODY_BYTES:,} bytes")
