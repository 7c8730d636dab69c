"""Values that cross between the judge and the judged, as JSON: numbers, strings, containers and Python's own types.

Its text runs in front of sandbox_answer.py and of sandbox_judge.py, inside the sandbox. Whoever reads gets values of
Python's own types, whatever the other side has sent.
"""

import builtins
import json
from typing import Any


class NotPlain(BaseException):
    """A value that has no plain form."""


class Gone(BaseException):
    """The other side has ended."""


class TooMuch(BaseException):
    """The other side sends without end."""


_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MOST_BYTES = 1 << 24


def packed(value: Any, other: Any) -> Any:
    """The value for JSON. A value of a subclass goes as one of its base; `other` packs what has no plain form."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):  # in base 16, which has no limit of digits
        return {"int": format(int.__index__(value), "x")}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return {"bytes": bytes.hex(value)}
    if isinstance(value, bytearray):
        return {"bytearray": bytearray.hex(value)}
    if isinstance(value, dict):
        return {"dict": [[packed(k, other), packed(v, other)] for k, v in dict.items(value)]}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [packed(item, other) for item in kind.__iter__(value)]}
    if type(value) is type and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    return other(value)


def unpacked(data: Any, other: Any) -> Any:
    """The value that `packed` had, of Python's own types; `other` unpacks what it packed there."""
    if data is None or type(data) in (bool, str):
        return data
    ((kind, content),) = data.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(float.fromhex(content[0]), float.fromhex(content[1]))
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(content)
    if kind == "dict":
        return {unpacked(k, other): unpacked(v, other) for k, v in content}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](unpacked(item, other) for item in content)
    if kind == "type":
        value = getattr(builtins, content)
        if type(value) is not type:
            raise NotPlain(f"{content} is not a type of Python's own")
        return value
    return other(kind, content)


class Channel:
    """Messages, one line of JSON each, over a socket."""

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
