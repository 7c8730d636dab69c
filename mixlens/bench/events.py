"""The record of one request: when it was sent, when every event of its answer arrived, and how it ended."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixlens.endpoints.endpoint import redacted
from mixlens.endpoints.protocols import COMMENT, DONE, ERROR, MALFORMED, TOKEN, Event, decode
from mixlens.endpoints.sse import Message, SSEParser
from mixlens.errors import BadInput

# How a request can end.
OUTCOMES = {
    "ok": "answered, to a named end",
    "http": "an answer with a status of 300 or more",
    "error": "an error inside an answer with status 200",
    "malformed": "an event that is no JSON, or not of the form asked for",
    "truncated": "the stream stopped before a finish reason or an end event",
    "empty": "answered without a single token",
    "timeout": "no byte for longer than allowed, or not done in time",
    "connect": "the connection was refused, or lost before an answer",
    "tls": "no trusted encrypted connection",
    "memory": "a batch on this machine that did not fit into memory",
    "failed": "a model on this machine that could not be loaded or run in this configuration",
    "interrupted": "stopped from outside while it ran on this machine",
}
# What the transport can report; the other outcomes are read off the events.
FAULTS = ("timeout", "connect", "tls", "cut")


@dataclass(frozen=True)
class Record:
    """One request, with every time in seconds on the run's monotonic clock; None for what did not happen.

    index       number of the request within its level
    level       the load it was part of, such as "concurrency 4" or "poisson 2/s"
    phase       "warm-up" (kept, and never in a statistic) or "measured"
    outcome     one of OUTCOMES
    events      every event of the stream in order of arrival
    started_s   the client began, with opening a connection if there was none
    connected_s the new connection stood; None on a connection that was open already
    sent_s      the request began to be written
    headers_s   the answer's status line and headers had arrived
    ended_s     the stream ended, or the fault was known
    scheduled_s open loop: when the request was due
    status      of HTTP
    retry_after_s  what a refusal asked for; nothing is tried again
    detail      what went wrong, in words
    rows        sequences that were generated together; a token event stands for one token of each
    peak_vram_bytes, peak_rss_bytes  on this machine: most memory of the accelerators, or of the process on a CPU, that
                the request held at a time, the model's weights included
    """

    index: int
    level: str
    phase: str
    outcome: str
    events: tuple[Event, ...]
    started_s: float
    ended_s: float
    connected_s: float | None = None
    sent_s: float | None = None
    headers_s: float | None = None
    scheduled_s: float | None = None
    status: int | None = None
    retry_after_s: float | None = None
    detail: str = ""
    rows: int = 1
    peak_vram_bytes: int | None = None
    peak_rss_bytes: int | None = None

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(event.text for event in self.events if event.kind == TOKEN)

    def to_json(self) -> str:
        """One line of JSON; what is None or empty is left out."""
        plain = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, "") and k != "events"}
        plain["events"] = [
            {k: v for k, v in dataclasses.asdict(event).items() if v not in (None, "")} for event in self.events
        ]
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record that `to_json` wrote. Raises BadInput when the line is something else."""
        try:
            plain = json.loads(line)
            events = tuple(Event(**event) for event in plain.pop("events"))
            return cls(**plain, events=events)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(
                f"Cannot read a record of a request ({type(error).__name__}: {error}): {line[:60]!r}. Pass a line of "
                "results.jsonl of a benchmark.",
                argument="line",
                value=line[:60],
            ) from error


class StreamReader:
    """Turns the bytes of one answer into stamped events; `redact` takes the key out of whatever is kept."""

    def __init__(self, protocol: str, redact: str | None = None) -> None:
        self._parser, self._protocol, self._redact = SSEParser(), protocol, redact
        self.events: list[Event] = []

    def feed(self, piece: bytes, at_s: float) -> None:
        """Bytes of an event stream that arrived at `at_s`."""
        try:
            messages = self._parser.feed(piece, at_s)
        except ValueError as error:
            self.events.append(Event(at_s, MALFORMED, str(error)))
            return
        self._keep(messages)

    def close(self, at_s: float) -> None:
        """The stream has ended."""
        self._keep(self._parser.close(at_s))

    def whole(self, body: str, at_s: float) -> None:
        """An answer that is no event stream: its body, complete at `at_s`, is the only event."""
        self._keep([Message(at_s, False, "", body)] if body.strip() else [])

    def _keep(self, messages: Iterable[Message]) -> None:
        for message in messages:
            message = dataclasses.replace(message, data=redacted(message.data, self._redact))
            self.events.append(decode(message, self._protocol))


def outcome_of(events: Iterable[Event], *, status: int | None, fault: str | None = None) -> str:
    """How a request ended, from what arrived and what the transport reports.

    status  of HTTP, None when no answer came
    fault   one of FAULTS or None; "cut" is a connection that ended inside an answer

    A fault after the answer's named end changes nothing: the answer is whole.
    """
    events = list(events)
    kinds = {event.kind for event in events}
    if fault in ("connect", "tls") or (fault == "timeout" and status is None):
        return fault
    if status is not None and status >= 300:
        return "http"
    if ERROR in kinds:
        return "error"
    if MALFORMED in kinds:
        return "malformed"
    ended = DONE in kinds or any(event.finish for event in events)
    if fault == "timeout" and not ended:
        return "timeout"
    if not ended and (fault == "cut" or kinds - {COMMENT}):
        return "truncated"
    return "ok" if TOKEN in kinds else "empty"


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """JSON Lines, one record a line."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Records of JSON Lines; a last line cut short, as a killed run leaves it, is passed over.

    Raises BadInput when any other line is no record.
    """
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield Record.from_json(line)
