"""A real server on 127.0.0.1 that answers as its test says; every socket is bounded and closed with the test."""

from __future__ import annotations

import json
import select
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bench_scripts import chunk, sse

# A wait of so many seconds between two pieces, or the end of the connection there.
CUT = "cut"
Piece = bytes | float | str


def answer(n: int = 3, wait: float = 0.002) -> list[Piece]:
    """A whole answer of n chunks and 2 n tokens."""
    pieces: list[Piece] = [b": waiting\n\n", sse(chunk({"role": "assistant", "content": ""}))]
    for i in range(n):
        pieces += [wait, sse(chunk({"content": f" {i}"}))]
    usage = {"prompt_tokens": 20, "completion_tokens": 2 * n}
    return [*pieces, sse(chunk({}, "stop")), sse({"choices": [], "usage": usage}), sse("[DONE]")]


class Script:
    """What the server does: a status, headers, and the pieces of a body; `requests` are those it was sent."""

    def __init__(self, pieces: Iterable[Piece], *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.pieces, self.status = list(pieces), status
        self.headers = {"Content-Type": "text/event-stream"} | (headers or {})
        self.requests: list[tuple[dict[str, str], dict]] = []
        self.active = self.most_active = 0
        self.places = 64  # answers at a time; more requests wait
        self.lock = threading.Lock()


@contextmanager
def serving(script: Script, *, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server that follows the script, over https where a context is given."""
    free = threading.BoundedSemaphore(script.places)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 5

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                script.requests.append((dict(self.headers), body))
                script.active += 1
                script.most_active = max(script.most_active, script.active)
            try:
                self.send_response(script.status)
                for name, value in script.headers.items():
                    self.send_header(name, value)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with free:
                    self.follow()
            except OSError:
                self.close_connection = True
            finally:
                with script.lock:
                    script.active -= 1

        def follow(self) -> None:
            for piece in script.pieces:
                if piece == CUT:
                    self.close_connection = True
                    return
                if isinstance(piece, float):
                    if select.select([self.connection], [], [], piece)[0]:  # the client has gone
                        self.close_connection = True
                        return
                elif isinstance(piece, bytes):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
