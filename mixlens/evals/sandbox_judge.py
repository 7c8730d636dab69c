"""Judge: a process that runs the tests of an answer in another process, and alone decides the verdict.

This source runs after sandbox_plain.py inside a separate sandbox, with PLAN set before it. Calls of the tests are sent
to the other process; comparisons use values of built-in types, created here.
"""

# ruff: noqa: F821
# pyright: reportUndefinedVariable=false

import builtins
import itertools
import socket
import sys
from typing import Any

numbers = itertools.count()


def main(plan):
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    objects = {}

    def ask(action, target, rest: Any = None):
        number, crossing = next(numbers), Crossing(number_of, object_of)
        channel.send([number, action, target, crossing.packed(rest)])
        try:
            reply = channel.receive()
            if reply["number"] != number:
                raise NotPlain("a reply to another question")
            for changed, content in reply["after"]:
                crossing.fill(crossing.containers[changed], content)
            error = raised(*reply["raised"]) if "raised" in reply else None
            value: Any = None if error else crossing.unpacked(reply["value"])
        except Exception as strange:
            raise NotPlain(f"a reply that cannot be read ({type(strange).__name__})") from None
        if error is not None:
            raise error
        return value

    class Object:
        """Object of the answer without a plain form. It can be used but not compared, as its result is not trusted."""

        def __init__(self, target, name):
            vars(self).update(_target=target, _name=name)

        def __call__(self, *args, **kwargs):
            return ask("call", self._target, (args, kwargs))

        def __getattr__(self, name):
            return ask("get", self._target, name)

        def __setattr__(self, name, value):
            ask("set", self._target, (name, value))

        def __getitem__(self, key):
            return ask("item", self._target, key)

        def __iter__(self):
            return iter(ask("items", self._target))

        def __len__(self):
            return ask("length", self._target)

        def __bool__(self):
            return ask("truth", self._target)

        def __eq__(self, other):
            raise NotPlain(f"the answer gave a {self._name}, which cannot be compared")

        __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__

        def __hash__(self):
            return hash(self._target)

    def number_of(value):
        if isinstance(value, Object):
            return {"object": [value._target, ""]}
        raise NotPlain(f"the tests pass a {type(value).__name__}")

    def object_of(kind, content):
        number, name = content
        if kind != "object" or type(number) is not int or type(name) is not str:
            raise NotPlain("a value of no known form")
        return objects.setdefault(number, Object(number, name))

    ask("load", plan["answer"])
    namespace = {"__name__": "tests", "__builtins__": builtins}
    exec(compile(plan["helpers"], "<helpers>", "exec"), namespace)
    namespace.update((name, Object(name, "function")) for name in plan["names"])
    exec(compile(plan["tests"], "<tests>", "exec"), namespace)


def raised(name, text):
    """Return a built-in exception of the same name if there is one, since the tests may expect it.

    StopIteration is replaced, because it would end the loops of the tests early, as in all(map(f, cases)).
    """
    if name in ("StopIteration", "StopAsyncIteration"):
        return RuntimeError(f"{name}: {text}")
    kind: Any = getattr(builtins, str(name), None)
    try:
        assert issubclass(kind, BaseException)
        return kind(str(text))
    except (AssertionError, TypeError):
        return Exception(f"{name}: {text}")


main(PLAN)
