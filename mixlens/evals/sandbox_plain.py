"""JSON encoding of values that cross between judge and answer: numbers, strings, containers and built-in types.

This source runs before sandbox_answer.py and sandbox_judge.py inside the sandbox. Readers get only values of built-in
types, whatever the other side sends.
"""

import builtins
import json
from typing import Any


class NotPlain(BaseException):
    """Raised for a value without a plain form."""


class Gone(BaseException):
    """Raised when the other side has ended."""


class TooMuch(BaseException):
    """Raised when the other side sends too much."""


_FIXED = (tuple, frozenset)
_CONTAINERS: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, bytearray, *_FIXED)}
_MOST_BYTES = 1 << 24


class Crossing:
    """Codec for the values of a request and its reply, to JSON and back to built-in types.

    Mutable containers are numbered on both sides in the order in which they cross. A container that occurs twice
    therefore stays one object, and changes by a call are applied to the original.

    pack_other, unpack_other  functions for values without a plain form
    """

    def __init__(self, pack_other: Any, unpack_other: Any) -> None:
        self.pack_other, self.unpack_other = pack_other, unpack_other
        self.containers: list = []
        self.numbers: dict = {}  # of containers, by id

    def packed(self, value: Any) -> Any:
        """Encode a value for JSON; a value of a subclass is sent as its base class."""
        if value is None or value is True or value is False:
            return value
        if isinstance(value, int):  # in base 16, which has no digit limit
            return {"int": format(int.__index__(value), "x")}
        if isinstance(value, float):
            return {"float": float.hex(value)}
        if isinstance(value, complex):
            return {"complex": [float.hex(value.real), float.hex(value.imag)]}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, bytes):
            return {"bytes": bytes.hex(value)}
        for name, kind in _CONTAINERS.items():
            if isinstance(value, kind):
                if id(value) in self.numbers:
                    return {"again": self.numbers[id(value)]}
                if kind not in _FIXED:
                    self._number(value)
                return {name: self.content(value)}
        if type(value) is type and getattr(builtins, value.__name__, None) is value:
            return {"type": value.__name__}
        return self.pack_other(value)

    def content(self, container: Any) -> Any:
        """Encode the content of a container for JSON."""
        if isinstance(container, bytearray):
            return bytearray.hex(container)
        if isinstance(container, dict):
            return [[self.packed(k), self.packed(v)] for k, v in dict.items(container)]
        kind = next(kind for kind in _CONTAINERS.values() if isinstance(container, kind))
        return [self.packed(item) for item in kind.__iter__(container)]

    def unpacked(self, data: Any) -> Any:
        """Decode a value from `packed` into built-in types."""
        if data is None or type(data) in (bool, str):
            return data
        ((kind, content),) = data.items()
        if kind == "int":
            return int(content, 16)
        if kind == "float":
            return float.fromhex(content)
        if kind == "complex":
            return complex(float.fromhex(content[0]), float.fromhex(content[1]))
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "again":
            return self.containers[content]
        if kind in _CONTAINERS:
            made = _CONTAINERS[kind]
            if made in _FIXED:
                return made(self.unpacked(item) for item in content)
            container = made()
            self._number(container)
            self.fill(container, content)
            return container
        if kind == "type":
            value = getattr(builtins, content)
            if type(value) is not type:
                raise NotPlain(f"{content} is not a type of Python's own")
            return value
        return self.unpack_other(kind, content)

    def fill(self, container: Any, content: Any) -> None:
        """Replace the items of a container by those encoded by `content`."""
        if isinstance(container, bytearray):
            items: Any = bytes.fromhex(content)
        elif isinstance(container, dict):
            items = {self.unpacked(k): self.unpacked(v) for k, v in content}
        else:
            items = [self.unpacked(item) for item in content]
        container.clear()
        (container.extend if isinstance(container, list | bytearray) else container.update)(items)

    def _number(self, container: Any) -> None:
        self.numbers[id(container)] = len(self.containers)
        self.containers.append(container)


class Channel:
    """Channel for messages over a socket, one line of JSON each."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.rest = b""

    def send(self, message: Any) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise Gone from None

    def receive(self) -> Any:
        parts = [self.rest]
        size = len(self.rest)
        while b"\n" not in parts[-1]:
            try:
                part = self.socket.recv(1 << 16)
            except OSError:
                part = b""
            if not part:
                raise Gone
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                raise TooMuch
        line, _, self.rest = b"".join(parts).partition(b"\n")
        return json.loads(line)
