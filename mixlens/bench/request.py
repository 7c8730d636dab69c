"""One request of a benchmark. Time stamps are taken before parsing; requests are never retried."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mixlens.bench.events import OUTCOMES, Record, StreamReader, outcome_of
from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.keys import redacted
from mixlens.endpoints.protocols import MALFORMED, OTHER, error_message
from mixlens.endpoints.transport import Answer, Fault, Timeouts, Transport
from mixlens.endpoints.waits import asked_wait

# How long to read a connection after the last event of an answer, so that it can be reused.
_GRACE_S = 0.05


@dataclass(frozen=True)
class Job:
    """A request to send: its position in the run and its content."""

    index: int
    level: str
    phase: str
    prompt: str
    max_tokens: int
    scheduled_s: float | None = None


class Sender:
    """Sends requests to one endpoint over a connection pool; `clock` returns monotonic seconds."""

    def __init__(self, endpoint: Endpoint, timeouts: Timeouts, clock: Callable[[], float]) -> None:
        self._endpoint, self._clock = endpoint, clock
        self._key = endpoint.key()
        self._transport = Transport(endpoint, timeouts)
        self.routing: list[tuple[Record, str]] = []  # measured requests with the message that held their routing

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.aclose()

    async def send(self, job: Job) -> Record:
        """Send one request and return its record, which also reports failures."""
        times: dict[str, Any] = {"started_s": self._clock()}
        reader = StreamReader(self._endpoint.protocol, self._key)
        answer: dict[str, Any] = {}
        fault, detail = None, ""
        try:
            await self._exchange(job, times, reader, answer)
        except Fault as error:
            fault, detail = error.kind, error.detail
        now = self._clock()
        reader.close(now, cut=fault is not None)
        times["ended_s"] = now if reader.ended_s is None else reader.ended_s
        outcome = outcome_of(reader.events, status=answer.get("status"), fault=fault)
        if outcome == "ok":
            detail = ""
        elif not detail:
            detail = answer.get("detail") or _words(reader, outcome)
        record = Record(
            index=job.index,
            level=job.level,
            phase=job.phase,
            outcome=outcome,
            events=() if outcome == "oversized" else tuple(reader.events),
            scheduled_s=job.scheduled_s,
            detail=redacted(detail, self._key)[:500],
            status=answer.get("status"),
            form=answer.get("form", reader.form),
            retry_after_s=answer.get("retry_after_s"),
            **times,
        )
        if self._endpoint.routing and outcome == "ok" and job.phase == "measured" and reader.routing is not None:
            self.routing.append((record, reader.routing))
        return record

    async def _exchange(self, job: Job, times: dict[str, Any], reader: StreamReader, record: dict[str, Any]) -> None:
        clock = self._clock

        async def trace(name: str, _: Any) -> None:
            if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                times["connected_s"] = clock()
            elif name.endswith(".send_request_headers.started"):
                times["sent_s"] = clock()

        headers, body = self._endpoint.request(job.prompt, max_tokens=job.max_tokens, key=self._key)
        headers["Content-Type"] = "application/json"
        content = json.dumps(body).encode()
        async with self._transport.send("POST", self._endpoint.address, headers, content, trace) as answer:
            times["headers_s"] = clock()
            record["status"] = answer.status
            if answer.status < 300:
                await self._read_stream(answer, reader)
                return
            body = await answer.body()
            text = redacted(body.decode("utf-8-sig", errors="replace"), self._key)
            record["form"] = "json"
            record["detail"] = answer.redirection or error_message(text)
            record["retry_after_s"] = asked_wait(answer.headers, body)

    async def _read_stream(self, answer: Answer, reader: StreamReader) -> None:
        """Feed a stream up to its last event; some servers keep the connection open after it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as until:
                async for piece in answer.pieces():
                    reader.feed(piece, self._clock())
                    if until.when() is None and reader.done_s is not None:
                        until.reschedule(asyncio.get_running_loop().time() + _GRACE_S)


def _words(reader: StreamReader, outcome: str) -> str:
    kinds = (outcome, OTHER) if outcome == MALFORMED else (outcome,)
    fault = next((event.text for event in reader.events if event.kind in kinds and event.text), "")
    return fault or OUTCOMES[outcome]
