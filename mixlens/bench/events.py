"""Records of requests: send time, arrival time of each event of the answer, and outcome."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mixlens.endpoints.keys import redacted, redacted_parts
from mixlens.endpoints.limits import MAX_BODY_BYTES, MAX_EVENTS, TooLarge
from mixlens.endpoints.protocols import (
    COMMENT,
    DONE,
    ERROR,
    MALFORMED,
    OTHER,
    REASONING,
    REFUSAL,
    ROUTED,
    TOKEN,
    USAGE,
    Event,
    decode,
    without_thinking,
)
from mixlens.endpoints.sse import Message, SSEParser
from mixlens.errors import BadInput

# Outcomes of a request.
OUTCOMES = {
    "ok": "answered up to an explicit end",
    "http": "an answer with a status of 300 or more",
    "error": "an error inside an answer with status 200",
    "malformed": "not HTTP, or an event that is not JSON or not in the expected format",
    "oversized": "headers, an event, the number of events or the whole answer exceed the limits",
    "truncated": "the stream stopped before a finish reason or an end event",
    "empty": "answered without a single token",
    "timeout": "no byte for longer than allowed, or not done in time",
    "connect": "the connection was refused, or lost before an answer",
    "tls": "the encrypted connection could not be established or is not trusted",
    "memory": "a batch on this machine that did not fit into memory",
    "failed": "a model on this machine that could not be loaded or run in this configuration",
    "interrupted": "stopped from outside while it ran on this machine",
}
_BOM = b"\xef\xbb\xbf"
_WHOLE = (b"{", b"[", b"<")
# An event that repeats the whole answer is recognized after this many events; a shorter answer may repeat itself.
_SEVERAL = 3
# Faults that the transport can report; all other outcomes follow from the events.
FAULTS = ("timeout", "connect", "tls", "malformed", "cut", "oversized")


@dataclass(frozen=True)
class Record:
    """One request. Times are seconds on the run's monotonic clock; None if the step did not happen.

    index       number of the request within its level
    level       load of the request, such as "concurrency 4" or "poisson 2/s"
    phase       "warm-up" (recorded, and excluded from all statistics) or "measured"
    outcome     one of OUTCOMES
    events      events of the stream in order of arrival
    started_s   start of the client, including the time to open a connection if necessary
    connected_s time at which a new connection was ready; None if the connection was already open
    sent_s      time at which the client began to write the request
    headers_s   time at which the status line and headers of the answer had arrived
    ended_s     end of the stream, or time at which the fault was detected
    scheduled_s time at which the request was due (open loop)
    status      HTTP status
    retry_after_s  wait requested by a refusal; requests are never retried
    detail      description of the failure
    form        "stream", or "json" for an answer that arrived in one piece and has no time to first token
    rows        number of sequences generated together; a token event holds one token of each
    peak_vram_bytes, peak_rss_bytes  peak memory of the accelerators, or of the process on a CPU, during the request,
                including the model's weights (loaded models only)
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
    form: str = "stream"
    rows: int = 1
    peak_vram_bytes: int | None = None
    peak_rss_bytes: int | None = None

    @property
    def text(self) -> str:
        """The complete text of the answer, without its reasoning."""
        return "".join(event.text for event in self.events if event.kind == TOKEN)

    @property
    def reasoning(self) -> str:
        """The complete text of the visible reasoning."""
        return "".join(event.reasoning for event in self.events)

    @property
    def finish(self) -> str | None:
        """The finish reason of the answer."""
        return next((event.finish for event in reversed(self.events) if event.finish), None)

    def to_json(self) -> str:
        """Serialize to one line of JSON, without fields that are None or empty."""
        plain = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, "") and k != "events"}
        plain["events"] = [
            {k: v for k, v in dataclasses.asdict(event).items() if v not in (None, "")} for event in self.events
        ]
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read a record written by `to_json`. Raises BadInput for any other line."""
        try:
            plain = json.loads(line)
            events = tuple(Event(**event) for event in plain.pop("events"))
            return cls(**plain, events=events)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(
                f"Cannot read the record of a request from {line[:60]!r} ({type(error).__name__}: {error}). Pass a "
                "line of a benchmark's results.jsonl.",
                argument="line",
                value=line[:60],
            ) from error


class StreamReader:
    """Parses the bytes of one answer into time-stamped events; `redact` is the key to remove from them."""

    def __init__(self, protocol: str, redact: str | None = None) -> None:
        self._parser, self._protocol, self._redact = SSEParser(), protocol, redact
        self.events: list[Event] = []
        self._model: str | None = None
        self._choices: set[int | None] = set()
        self._refused = False  # some servers give a refusal another finish reason
        self._chars = 0  # total characters of the events
        self._body: bytearray | None = bytearray()  # of an answer that is not a stream, or has not begun
        self._body_s, self._begun = 0.0, False
        self.done_s: float | None = None  # time of the explicit end event
        self.routing: str | None = None  # the message that holds routing, as JSON

    @property
    def ended_s(self) -> float | None:
        """Time of the explicit end, or of the last event after a finish reason; None if the answer did not end."""
        if self.done_s is not None or not any(event.finish for event in self.events):
            return self.done_s
        return next(event.at_s for event in reversed(self.events) if event.kind != COMMENT)

    @property
    def form(self) -> str:
        """Return "json" for an answer that begins like JSON or HTML, regardless of its headers; otherwise "stream"."""
        return "json" if self._body is not None and self._begun else "stream"

    def feed(self, piece: bytes, at_s: float) -> None:
        """Parse bytes of an answer that arrived at `at_s`. Raises TooLarge."""
        if not self._begun:
            piece = bytes(self._body or b"") + piece
            self._body, self._begun = (
                bytearray(),
                bool(piece.removeprefix(_BOM).strip()) and piece != _BOM[: len(piece)],
            )
            if self._begun and piece.removeprefix(_BOM).lstrip()[:1] not in _WHOLE:
                self._body = None
        if self._body is None:
            self._keep(self._parser.feed(piece, at_s))
            return
        self._body += piece
        self._body_s = at_s
        if len(self._body) > MAX_BODY_BYTES:
            raise TooLarge(f"the answer is longer than {MAX_BODY_BYTES:,} bytes")

    def close(self, at_s: float, *, cut: bool = False) -> None:
        """Parse the rest of the answer after its end, mask the key, and separate tagged reasoning from text.

        cut  whether the answer ended early; half an answer that is not a stream is then ignored
        """
        with suppress(TooLarge):  # an answer beyond the limits has already been refused
            body = bytes(self._body or b"").decode("utf-8-sig", "replace") if self.form == "json" else ""
            if body and not (cut and decode(Message(at_s, False, "", body), self._protocol).kind == MALFORMED):
                self._keep([Message(self._body_s, False, "", body)])
            self._keep(self._parser.close(at_s))
        if self._redact is not None:
            self._mask(self._redact)
        self._drop_whole()
        _, thought = without_thinking("".join(event.text for event in self.events if event.kind == TOKEN))
        left = len(thought)
        for at, event in enumerate(self.events):
            if not left:
                break
            if event.kind == TOKEN:
                inside, text = event.text[:left], event.text[left:]
                left -= len(inside)
                kind = TOKEN if text.strip() else REASONING
                self.events[at] = dataclasses.replace(event, kind=kind, text=text, reasoning=event.reasoning + inside)

    def _keep(self, messages: Iterable[Message]) -> None:
        for message in messages:
            message = dataclasses.replace(message, data=redacted(message.data, self._redact))
            event = decode(message, self._protocol)
            if ROUTED in message.data and event.kind not in (ERROR, MALFORMED):
                self.routing = message.data
            if event.model == self._model:
                event = dataclasses.replace(event, model=None)
            self._model = event.model or self._model
            if self._refused and event.finish:
                event = dataclasses.replace(event, finish=REFUSAL)
            self._refused = self._refused or event.finish == REFUSAL
            if event.kind in (TOKEN, REASONING):
                self._choices.add(event.choice)
            if len(self._choices) > 1:
                event = Event(event.at_s, MALFORMED, "several answers to one request; only one is supported")
            if event.kind == DONE and not event.finish and self.done_s is None:
                self.done_s = event.at_s
            self._chars += len(event.text) + len(event.reasoning)
            if len(self.events) == MAX_EVENTS or self._chars > MAX_BODY_BYTES:
                raise TooLarge(f"the stream has more than {MAX_EVENTS:,} events, or {MAX_BODY_BYTES:,} characters")
            self.events.append(event)

    def _drop_whole(self) -> None:
        """Remove the text of a last event that repeats the whole answer, as some gateways send."""
        *before, last = [at for at, event in enumerate(self.events) if event.kind == TOKEN] or [0]
        if len(before) < _SEVERAL or self.events[last].text != "".join(self.events[at].text for at in before):
            return
        kind = USAGE if self.events[last].output_tokens else DONE if self.events[last].finish else OTHER
        self.events[last] = dataclasses.replace(self.events[last], kind=kind, text="")

    def _mask(self, key: str) -> None:
        """Mask a key that is split across events: in the answer, in the reasoning, and in comments."""
        for chosen, field in (((TOKEN,), "text"), ((TOKEN, REASONING), "reasoning"), ((COMMENT,), "text")):
            where = [at for at, event in enumerate(self.events) if event.kind in chosen]
            given = [getattr(self.events[at], field) for at in where]
            for at, before, after in zip(where, given, redacted_parts(given, key), strict=True):
                if before != after:
                    self.events[at] = dataclasses.replace(self.events[at], **{field: after})


def outcome_of(events: Iterable[Event], *, status: int | None, fault: str | None = None) -> str:
    """Determine the outcome of a request from its events and the report of the transport.

    status  HTTP status; None without an answer
    fault   one of FAULTS or None; "cut" means that the connection ended within an answer

    A fault after the explicit end of an answer has no effect, because the answer is complete.
    """
    events = list(events)
    kinds = {event.kind for event in events}
    if fault in ("connect", "tls", "malformed") or (fault is not None and fault != "cut" and status is None):
        return fault
    if status is not None and status >= 300:
        return "http"
    ended = DONE in kinds or any(event.finish for event in events)
    if fault == "oversized" and not ended:
        return fault
    if ERROR in kinds:
        return "error"
    answered = kinds & {TOKEN, REASONING}
    if MALFORMED in kinds or (not answered and any(event.kind == OTHER and event.text for event in events)):
        return "malformed"
    if fault == "timeout" and not ended:
        return fault
    if not ended and (fault == "cut" or kinds - {COMMENT}):
        return "truncated"
    return "ok" if answered else "empty"


def records_bytes(records: Iterable[Record]) -> bytes:
    """Serialize records as JSON Lines."""
    return "".join(record.to_json() + "\n" for record in records).encode()


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Read records from JSON Lines, skipping an incomplete last line, as left by a killed run.

    Raises BadInput if any other line is not a record.
    """
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield Record.from_json(line)
