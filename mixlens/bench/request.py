"""One request over httpx. Times are taken before parsing, and requests are never retried."""

from __future__ import annotations

import asyncio
import email.utils
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from mixlens.bench.events import OUTCOMES, Record, StreamReader, outcome_of
from mixlens.endpoints.endpoint import Endpoint, redacted
from mixlens.endpoints.protocols import error_message

# Limit of the body of a refusal or of an answer that is not streamed.
_MAX_BODY_BYTES = 8 << 20


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds: opening a connection, between two bytes, and a whole request."""

    connect_s: float = 10.0
    stall_s: float = 60.0
    total_s: float = 600.0


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
        self._endpoint, self._timeouts, self._clock = endpoint, timeouts, clock
        self._key = endpoint.key()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeouts.stall_s, connect=timeouts.connect_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=not endpoint.is_local,  # a proxy would add its own latency
        )

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def send(self, job: Job) -> Record:
        """Send one request and return its record, which also reports failures."""
        times: dict[str, Any] = {"started_s": self._clock()}
        reader = StreamReader(self._endpoint.protocol, self._key)
        answer: dict[str, Any] = {}
        fault, detail = None, ""
        try:
            async with asyncio.timeout(self._timeouts.total_s):
                await self._exchange(job, times, reader, answer)
        except TimeoutError:
            fault, detail = "timeout", f"not done in {self._timeouts.total_s:g} s"
        except httpx.TransportError as error:
            fault, detail = self._fault(error, answered="status" in answer)
        times["ended_s"] = times.get("ended_s", self._clock())
        reader.close(times["ended_s"])
        outcome = outcome_of(reader.events, status=answer.get("status"), fault=fault)
        if outcome == "ok":
            detail = ""
        elif not detail:
            detail = answer.get("detail") or _words(reader, outcome)
        return Record(
            index=job.index,
            level=job.level,
            phase=job.phase,
            outcome=outcome,
            events=tuple(reader.events),
            scheduled_s=job.scheduled_s,
            detail=redacted(detail, self._key)[:500],
            status=answer.get("status"),
            retry_after_s=answer.get("retry_after_s"),
            **times,
        )

    async def _exchange(self, job: Job, times: dict[str, Any], reader: StreamReader, answer: dict[str, Any]) -> None:
        clock = self._clock

        async def trace(name: str, _: Any) -> None:
            if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                times["connected_s"] = clock()
            elif name.endswith(".send_request_headers.started"):
                times["sent_s"] = clock()

        headers, body = self._endpoint.request(job.prompt, max_tokens=job.max_tokens, key=self._key)
        content = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
        async with self._client.stream(
            "POST", self._endpoint.address, headers=headers, content=content, extensions={"trace": trace}
        ) as response:
            times["headers_s"] = clock()
            answer["status"] = response.status_code
            streams = not any(form in response.headers.get("content-type", "") for form in ("json", "html"))
            if response.status_code < 300 and streams:
                async for piece in response.aiter_raw():
                    reader.feed(piece, clock())
                times["ended_s"] = clock()
                return
            whole = bytearray()
            async for piece in response.aiter_raw():
                whole += piece[: _MAX_BODY_BYTES - len(whole)]
            times["ended_s"] = clock()
            text = redacted(whole.decode("utf-8", errors="replace"), self._key)
            if response.status_code < 300:
                reader.whole(text, times["ended_s"])
            else:
                answer["detail"] = error_message(text)
                answer["retry_after_s"] = retry_after(response.headers.get("retry-after"))

    def _fault(self, error: httpx.TransportError, *, answered: bool) -> tuple[str, str]:
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        if isinstance(error, httpx.ConnectTimeout):
            return "timeout", f"no connection in {self._timeouts.connect_s:g} s"
        if isinstance(error, httpx.TimeoutException):
            return "timeout", f"no byte for {self._timeouts.stall_s:g} s"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLError):
                return "tls", said
            cause = cause.__cause__ or cause.__context__
        return ("cut" if answered else "connect"), said


def retry_after(value: str | None) -> float | None:
    """Parse a Retry-After header, in seconds or as a date, into seconds; None if it is absent or invalid."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else None
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max((until - datetime.now(UTC)).total_seconds(), 0.0)


def _words(reader: StreamReader, outcome: str) -> str:
    fault = next((event.text for event in reader.events if event.kind == outcome), "")
    return fault or OUTCOMES[outcome]
