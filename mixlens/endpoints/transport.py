"""Requests over httpx with a deadline and size limits: streamed for benchmarks, and whole for other calls."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from mixlens.endpoints.compression import Decompressor
from mixlens.endpoints.keys import KeyFilter
from mixlens.endpoints.limits import MAX_BODY_BYTES, MAX_STREAM_BYTES, TooLarge
from mixlens.errors import BadInput

if TYPE_CHECKING:
    from mixlens.endpoints.endpoint import Endpoint

# Limit on the body of an answer with an error status.
_MAX_REFUSAL_BYTES = 1 << 16
_HEADERS_TOO_LARGE = 431

Trace = Callable[[str, Any], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds for opening a connection, between two bytes, and for a whole request."""

    connect_s: float = 10.0
    stall_s: float = 60.0
    total_s: float = 600.0


class Fault(Exception):
    """Raised for a request without a complete answer.

    kind    "connect", "timeout", "tls", "malformed" (not HTTP), "cut" (within an answer) or "oversized"
    detail  description of the failure, which may quote the server
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


class Answer:
    """Status and headers of an answer. The body can be read once, in pieces or whole."""

    def __init__(self, response: httpx.Response, fault: Callable[[Exception], Fault]) -> None:
        self._response, self._fault = response, fault
        self.status, self.headers = response.status_code, response.headers

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")

    @property
    def redirection(self) -> str:
        """Description of a redirect, else "". Redirects are not followed, as they could leak the key."""
        if not 300 <= self.status < 400:
            return ""
        if "location" not in self.headers:
            return "redirected, without an address"
        return f"redirected to {self.headers['location']}; pass that address as the URL"

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives, decompressed. Raises Fault or TooLarge."""
        received = given = 0
        try:
            decompressor = Decompressor(self.headers.get("content-encoding", ""))
            async for raw in self._response.aiter_raw():
                received += len(raw)
                for number, piece in enumerate(decompressor.feed(raw)):
                    if number:
                        await asyncio.sleep(0)  # lets the deadline interrupt a decompression bomb
                    given += len(piece)
                    yield piece
                if max(received, given) > MAX_STREAM_BYTES:
                    raise TooLarge(f"the answer is longer than {MAX_STREAM_BYTES:,} bytes")
            return
        except TooLarge:
            raise
        except Exception as error:  # a server can make httpx and its dependencies raise anything
            fault = self._fault(error)
        raise fault

    async def body(self) -> bytes:
        """Read the body, only its beginning for an error status. Raises Fault or TooLarge."""
        whole = bytearray()
        async for piece in self.pieces():
            whole += piece
            if self.status >= 300 and len(whole) > _MAX_REFUSAL_BYTES:
                break
            if len(whole) > MAX_BODY_BYTES:
                raise TooLarge(f"the answer is longer than {MAX_BODY_BYTES:,} bytes")
        return bytes(whole)


class Transport:
    """Connections to one endpoint within one event loop.

    Raises BadInput if the proxy or the certificates set in the environment cannot be used.
    """

    def __init__(self, endpoint: Endpoint, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        key = endpoint.key()
        self._logs = None if key is None else KeyFilter(key)
        certificates = _certificates(endpoint)
        try:
            self._client = httpx.AsyncClient(
                headers={"Accept-Encoding": "identity"},  # compression delays events
                timeout=httpx.Timeout(timeouts.stall_s, connect=timeouts.connect_s, pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=not endpoint.is_local,  # local servers are reached without a proxy
                verify=certificates,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise _no_proxy(endpoint, error) from error
        if self._logs is not None:
            self._logs.attach()

    async def aclose(self) -> None:
        await self._client.aclose()
        if self._logs is not None:
            self._logs.detach()

    @asynccontextmanager
    async def send(
        self, method: str, address: str, headers: Mapping[str, str], content: bytes | None, trace: Trace | None = None
    ) -> AsyncIterator[Answer]:
        """Send a request and yield its answer, which is closed with the context. Raises Fault."""
        extensions = {} if trace is None else {"trace": trace}
        request = self._client.build_request(method, address, headers=headers, content=content, extensions=extensions)
        try:
            async with asyncio.timeout(self._timeouts.total_s):
                response = await self._open(request)
                try:
                    yield Answer(response, self._fault)
                finally:
                    await response.aclose()
            return
        except TimeoutError:
            fault = Fault("timeout", f"not done in {self._timeouts.total_s:g} s")
        except TooLarge as error:
            fault = Fault("oversized", str(error))
        raise fault

    async def _open(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except Exception as error:  # a server or proxy can make httpx and its dependencies raise anything
            fault = self._fault(error, answered=False)
        raise fault  # not within the handler: a chained traceback would quote the server

    def _fault(self, error: Exception, *, answered: bool = True) -> Fault:
        said = f"{type(error).__name__}: {error}".removesuffix(": ").removesuffix(".")
        if isinstance(error, ValueError):
            return Fault("cut" if answered else "malformed", str(error))
        if isinstance(error, httpx.ConnectTimeout):
            return Fault("timeout", f"no connection in {self._timeouts.connect_s:g} s")
        if isinstance(error, httpx.TimeoutException):
            return Fault("timeout", f"no byte for {self._timeouts.stall_s:g} s")
        causes = list(_causes(error))
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            return Fault("tls", said)
        if any(getattr(cause, "error_status_hint", None) == _HEADERS_TOO_LARGE for cause in causes):
            return Fault("oversized", "the headers of the answer are too long")
        if answered:
            return Fault("cut", said)
        unreadable = any(type(cause).__module__.startswith("h11") for cause in causes)
        return Fault("malformed" if unreadable else "connect", said)


@dataclass(frozen=True)
class Fetched:
    """An answer read in full."""

    status: int
    headers: Mapping[str, str]
    content_type: str
    redirection: str
    body: bytes


class Client:
    """Connections to one endpoint for untimed calls, shared by threads.

    The connections run in an event loop on a separate thread, because a blocking read cannot have a deadline. Use the
    client as a context manager or close it; otherwise it closes when garbage-collected.

    Raises BadInput if the proxy or the certificates set in the environment cannot be used.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        limit = endpoint.deadline_s
        self._transport = Transport(endpoint, Timeouts(stall_s=limit, total_s=limit))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop, self._transport), daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._stop()
        self._thread.join()

    def fetch(self, method: str, address: str, headers: Mapping[str, str], content: bytes | None) -> Fetched:
        """Send a request and read its answer. Raises Fault."""
        future = asyncio.run_coroutine_threadsafe(self._fetch(method, address, headers, content), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # after an interrupt

    async def _fetch(self, method: str, address: str, headers: Mapping[str, str], content: bytes | None) -> Fetched:
        async with self._transport.send(method, address, headers, content) as answer:
            body = await answer.body()
            return Fetched(answer.status, answer.headers, answer.content_type, answer.redirection, body)
        raise AssertionError


def _serve(loop: asyncio.AbstractEventLoop, transport: Transport) -> None:
    loop.run_forever()
    loop.run_until_complete(transport.aclose())
    loop.close()


def _certificates(endpoint: Endpoint) -> ssl.SSLContext:
    """Return a context that trusts the certificates of SSL_CERT_FILE or SSL_CERT_DIR, else those of certifi."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise BadInput(
            f"Cannot reach {endpoint.host}: SSL_CERT_FILE or SSL_CERT_DIR cannot be read ({error}). "
            "Set the variable to a file of certificates in PEM format, or unset it.",
            argument="SSL_CERT_FILE",
            value=os.environ.get("SSL_CERT_FILE"),
        ) from error


def _no_proxy(endpoint: Endpoint, error: Exception) -> BadInput:
    names = [name for name in os.environ if name.lower() in ("all_proxy", "http_proxy", "https_proxy")]
    return BadInput(
        f"Cannot reach {endpoint.host} through the proxy of {', '.join(sorted(names)) or 'the environment'}: {error}. "
        "Use an http://, https:// or socks5:// proxy, or unset the variable.",
        argument="proxy",
        value=sorted(names),
    )


def _causes(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
