"""A server on 127.0.0.1 that writes what a function gives it, byte for byte, whether or not it is HTTP."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
# A number in place of bytes is a wait in seconds, which ends when the client goes.
Writes = Callable[[], Iterable[bytes | float]]


def whole(head: bytes, body: bytes) -> list[bytes]:
    return [head + b"Content-Length: %d\r\n\r\n" % len(body), body]


@contextmanager
def writing(writes: Writes) -> Iterator[tuple[str, list[bytes]]]:
    """The server's URL, and the requests that it has had."""
    requests: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                requests.append(_request(connection))
                for piece in writes():
                    if isinstance(piece, bytes):
                        connection.sendall(piece)
                    elif select.select([connection], [], [], piece)[0]:
                        return
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(5)
            thread = threading.Thread(target=answer, args=(connection,))
            threads.append(thread)
            thread.start()

    threads: list[threading.Thread] = []
    listener = socket.create_server(("127.0.0.1", 0))
    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(5)
        for thread in threads:
            thread.join(5)


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0)
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body
