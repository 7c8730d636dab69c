"""Process with the model-written code, which executes the requests of the judge over a channel.

This source runs after sandbox_plain.py inside the sandbox. It has neither the tests nor their expected values.
"""

# ruff: noqa: F821
# pyright: reportUndefinedVariable=false

import os
import socket
import sys

namespace = {"__name__": "answer", "__builtins__": __builtins__}  # not __main__, so that its examples are not run
held: dict = {}  # objects without a plain form, by number; the judge has only their numbers


def hold(value):
    held[id(value)] = value
    return {"object": [id(value), type(value).__name__]}


def find(target):
    if isinstance(target, int):
        return held[target]
    if target not in namespace:
        raise NameError(f"name {target!r} is not defined")
    return namespace[target]


def object_of(kind, content):
    return find(content[0])


def do(action, target, rest):
    if action == "load":
        exec(compile(target.encode("utf-8", "surrogateescape"), "<program>", "exec"), namespace)
        return None
    target = find(target)
    if action == "call":
        return target(*rest[0], **rest[1])
    if action == "get":
        return getattr(target, rest)
    if action == "set":
        return setattr(target, *rest)
    if action == "item":
        return target[rest]
    return {"items": list, "length": len, "truth": bool}[action](target)


def serve():
    descriptor = int(sys.argv[1])
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 64)
    channel = Channel(socket.socket(fileno=descriptor))
    sys.argv = ["program"]
    while True:
        number, action, target, sent = channel.receive()
        reply = {"number": number, "after": []}
        crossing = Crossing(hold, object_of)
        try:
            rest = crossing.unpacked(sent)
            came = [(one, crossing.content(one)) for one in crossing.containers]
            try:
                value = do(action, target, rest)
            finally:
                now = [crossing.content(one) for one, _ in came]
                reply["after"] = [[n, now[n]] for n, (_, before) in enumerate(came) if now[n] != before]
            reply["value"] = crossing.packed(value)
        except BaseException as error:
            reply["raised"] = [type(error).__name__, str(error)[:2000]]
        channel.send(reply)


try:
    serve()
except Gone:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
