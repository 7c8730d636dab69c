"""One request over httpx. Times are taken before parsing, and requests are never retried."""

from __future__ import annotations

import asyncio
import email.utils
import json
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

import httpx

from mixlens.bench.events import OUTCOMES, Record, StreamReader, outcome_of
from mixlens.endpoints.calls import no_proxy
from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.keys import redacted
from mixlens.endpoints.protocols import error_message

# Limit of the body of a refusal or of an answer that is not streamed.
_MAX_BODY_BYTES = 8 << 20
_MAX_STREAM_BYTES = 256 << 20
# How long a connection is read after the last event of an answer, so that it can be used again.
_GRACE_S = 0.05


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
        try:
            self._client = httpx.AsyncClient(
                timeout=httpx.Timeout(timeouts.stall_s, connect=timeouts.connect_s, pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=not endpoint.is_local,  # a proxy would add its own latency
            )
        except (ImportError, ValueError) as error:
            raise no_proxy(endpoint, error) from error

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
        except httpx.DecodingError as error:
            fault, detail = "cut", f"the answer cannot be decompressed, or is too long: {error}"
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
            form=answer.get("form", "stream"),
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
                _check_encoding(response, answer)
                await self._read_stream(response, reader)
                times["ended_s"] = clock() if reader.done_s is None else reader.done_s
                return
            answer["form"] = "json"
            whole = bytearray()
            async for piece in response.aiter_bytes():
                whole += piece[: _MAX_BODY_BYTES - len(whole)]
            times["ended_s"] = clock()
            text = redacted(whole.decode("utf-8", errors="replace"), self._key)
            if response.status_code < 300:
                reader.whole(text, times["ended_s"])
            else:
                answer["detail"] = error_message(text)
                if 300 <= response.status_code < 400:
                    place = response.headers.get("location", "nowhere")
                    answer["detail"] = f"redirected to {redacted(place, self._key)}; pass that address as the URL"
                answer["retry_after_s"] = retry_after(response.headers.get("retry-after"))

    async def _read_stream(self, response: httpx.Response, reader: StreamReader) -> None:
        """Feed a stream to its end, which is its last event: some servers keep the connection open after it."""
        size, deadline = 0, None
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as until:
                async for piece in response.aiter_bytes():
                    size += len(piece)
                    if size > _MAX_STREAM_BYTES:
                        raise httpx.DecodingError(f"the stream is longer than {_MAX_STREAM_BYTES:,} bytes")
                    reader.feed(piece, self._clock())
                    if deadline is None and reader.done_s is not None:
                        deadline = asyncio.get_running_loop().time() + _GRACE_S
                        until.reschedule(deadline)

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


def _check_encoding(response: httpx.Response, answer: dict[str, Any]) -> None:
    """Say so where the answer is compressed in a way that this client cannot undo."""
    encodings = {part.strip() for part in response.headers.get("content-encoding", "").split(",")}
    if unknown := encodings - {"", "identity", *httpx_encodings()}:
        answer["detail"] = f"the answer is compressed as {', '.join(sorted(unknown))}, although identity was asked for"


def httpx_encodings() -> frozenset[str]:
    """Compressions that httpx undoes with what is installed."""
    packages = {"br": ("brotli", "brotlicffi"), "zstd": ("zstandard",)}
    found = {name for name, any_of in packages.items() if any(find_spec(package) for package in any_of)}
    return frozenset({"gzip", "deflate", *found})


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
