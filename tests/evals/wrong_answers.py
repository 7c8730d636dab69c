"""Answers that do not solve their task and try to be passed: each defines an `add` that does not add, or none."""

# ruff: noqa: E501

from __future__ import annotations

import re

# What `import server` stands for in them: the globals of the program that holds the answer, found by its frames.
_SERVER = """import sys
class _Server:
    frame = sys._getframe()
    while 'Channel' not in frame.f_globals:
        frame = frame.f_back
    found = frame.f_globals
    def __getattr__(self, name): return _Server.found[name]
    def __setattr__(self, name, value): _Server.found[name] = value
server = _Server()
"""

# What the program that holds the answer is made to reply, in the place of what it should.
_FORGED = {
    "true": "{**m, 'value': True}",
    "the result": "{**m, 'value': {'int': '0'}}",
    "code": "{**m, 'value': {'type': 'exec'}, 'raised': ['eval', 'exit(0)']}",
    "a strange form": "{**m, 'value': {'int': '5', 'float': '5'}}",
    "a bare number": "{**m, 'value': 5}",
    "digits and more": "{**m, 'value': {'int': ' _5'}}",
    "not a number": "{**m, 'value': {'list': [{'float': 'nan'}]}}",
    "an object of the number of the result": "{**m, 'value': {'object': [5, 'int']}}",
    "an object of no number": "{**m, 'value': {'object': [True, 'int']}}",
    "a type": "{**m, 'value': {'type': 'object'}}",
    "a built-in function": "{**m, 'value': {'type': '__import__'}}",
    "NotImplemented": "{**m, 'value': {'type': 'NotImplemented'}}",
    "a container that was sent": "{**m, 'value': {'again': 0}}",
    "a container that was not": "{**m, 'value': {'again': 9}}",
    "a circle": "{**m, 'value': {'list': [{'again': 1}]}}",
    "keywords that were changed": "{**m, 'after': [[0, [['x', {'int': '5'}]]]]}",
    "arguments that were not sent": "{**m, 'after': [[9, []]]}",
    "arguments of no form": "{**m, 'after': 5}",
    "no arguments": "{'number': m['number'], 'value': None}",
    "no exception": "{**m, 'raised': []}",
    "an end without a word": "{**m, 'raised': ['SystemExit', '']}",
    "an end of a generator": "{**m, 'raised': ['GeneratorExit', '']}",
    "a failed assertion": "{**m, 'raised': ['AssertionError', '']}",
    "the base of all exceptions": "{**m, 'raised': ['BaseException', 'completed']}",
    "a group of exceptions": "{**m, 'raised': ['BaseExceptionGroup', 'x']}",
    "the end of the memory": "{**m, 'raised': ['MemoryError', '']}",
    "no name": "{**m, 'raised': [None, 0]}",
    "the number of the next": "{**m, 'number': m['number'] + 1}",
}

# fmt: off
WRONG = {
    "nothing": "",
    "a constant": "def add(x, y): return 5",
    "equal to all, a class": "class Y:\n    def __eq__(s, o): return True\ndef add(x, y): return Y()",
    "equal to all, an int": (
        "class Y(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef add(x, y): return Y(0)"
    ),
    "equal to all, a float": "class Y(float):\n    def __eq__(s, o): return True\ndef add(x, y): return Y(0)",
    "equal to all, a str": "class Y(str):\n    def __eq__(s, o): return True\ndef add(x, y): return Y()",
    "equal to all, in reverse": "class Y(int):\n    def __ne__(s, o): return False\ndef add(x, y): return Y()",
    "its class is said to be int": (
        "class Y:\n    __class__ = int\n    def __eq__(s, o): return True\ndef add(x, y): return Y()"
    ),
    "a mock": "from unittest import mock\nadd = mock.MagicMock()\nadd.return_value.__eq__ = lambda s, o: True",
    "mock.ANY": "from unittest.mock import ANY\ndef add(x, y): return ANY",
    "a type equal to all": (
        "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = type.__hash__\n"
        "class int(metaclass=M): pass\ndef add(x, y): return int"
    ),
    "exit": "import sys\nsys.exit(0)",
    "exit in the call": "import sys\ndef add(x, y): sys.exit(0)",
    "_exit": "import os\nos._exit(0)",
    "_exit in the call": "import os\ndef add(x, y): os._exit(0)",
    "_exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef add(x, y): return 0",
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "a fork goes on": "import os\nif os.fork(): os._exit(0)\ndef add(x, y): return 0",
    "a fork in the call": "import os\ndef add(x, y):\n    os.fork()\n    return 0",
    "json.dumps replaced": 'import json\njson.dumps = lambda *a, **k: \'["completed", ""]\'\ndef add(x, y): return 0',
    "json.loads replaced": "import json\njson.loads = lambda *a: [0, 'length', 'x', None]\ndef add(x, y): return 0",
    "packed replaced": (
        "import server\nfor name in ('packed', 'unpacked', 'do', 'find'):\n"
        "    setattr(server, name, lambda *a: 5)\ndef add(x, y): return 0"
    ),
    "frames are read": (
        "import os, sys\nframe = sys._getframe()\nwhile frame:\n    if 'plan' in frame.f_locals:\n"
        "        line = frame.f_locals['plan']['token'] + '[\"completed\", \"\"]\\n'\n"
        "        os.write(frame.f_locals['report'], line.encode())\n    frame = frame.f_back\nos._exit(0)"
    ),
    "every descriptor is written": (
        'import os\nfor fd in range(64):\n    try:\n        os.write(fd, b\'["completed", ""]\\n\' * 9)\n'
        "    except OSError:\n        pass\ndef add(x, y): return 0"
    ),
    "replies in advance": (
        "import os, json\nfor n in range(9):\n    for fd in range(3, 9):\n        try:\n"
        "            os.write(fd, (json.dumps({'number': n, 'value': True}) + '\\n').encode())\n"
        "        except OSError:\n            pass\ndef add(x, y): return 0"
    ),
    "the plan is read again": (
        "import os\nos.lseek(0, 0, 0)\nplan = os.read(0, 1 << 20)\nassert b'add(2, 3)' in plan\ndef add(x, y): return 5"
    ),
    "builtins are replaced": (
        "import builtins\nbuiltins.AssertionError = BaseException\nbuiltins.compile = lambda *a, **k: None\n"
        "builtins.exec = lambda *a: None\ndef add(x, y): return 0"
    ),
    "names of the tests": "set = int = str = lambda *a: 5\ncheck = lambda *a: None\ndef add(x, y): return 0",
    "no asserts": "import sys\nsys.flags.optimize\n__debug__\ndef add(x, y): return 0",
    "excepthook": "import sys\nsys.excepthook = lambda *a: None\ndef add(x, y): raise ValueError",
    "tracing": "import sys\nsys.settrace(lambda *a: None)\ndef add(x, y): return 0",
    "a system exit of its own": "class X(SystemExit): pass\ndef add(x, y): raise X(0)",
    "generator exit": "def add(x, y): raise GeneratorExit",
    "stop iteration": "def add(x, y): raise StopIteration(5)",
    "the judge's own exceptions": "class Gone(BaseException): pass\ndef add(x, y): raise Gone('completed')",
    "an exception that passes for a result": "def add(x, y): raise KeyError('completed')",
    "its arguments are changed": "def add(x, y):\n    import gc\n    gc.collect()\n    return None",
    "no builtins": "__builtins__ = None\nadd = 0",
    "no modules": "import sys\nsys.modules.clear()\nadd = 0",
    "no recursion": "import sys\nsys.setrecursionlimit(12)\ndef add(x, y): return 0",
    "a codec": "# coding: hz\nadd=0\n~{",
    "an open string": 'add = 0\nx = """',
    "an open block": "add = 0\nif 0:\n    pass\nelse:",
    "a NUL": "add = 0\n\0",
    "a lone surrogate": "add = '\ud800'",
    "source that is long": "add = 0\n" + "x = 1\n" * 10_000,
    "deep nesting": "def add(x, y):\n    a = []\n    for _ in range(100_000): a = [a]\n    return a",
    "a circle": "def add(x, y):\n    a = []\n    a.append(a)\n    return a",
    "not a number": "def add(x, y): return float('nan')",
    "a generator of results": "def add(x, y): yield from (5, 12)",
    "a lambda": "def add(x, y): return lambda: 5",
    "a thread that exits": (
        "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0), os._exit(0))).start()\n"
        "def add(x, y): return 0"
    ),
    "a signal handler": (
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(0, 1e-5)\n"
        "def add(x, y):\n    signal.pause()\n    return 0"
    ),
    "equal to all, a list": (
        "class Y(list):\n    def __eq__(s, o): return True\n    def __len__(s): return 5\ndef add(x, y): return Y()"
    ),
    "equal to all, a tuple in a list": (
        "class Y(tuple):\n    def __eq__(s, o): return True\ndef add(x, y): return [Y(), {1: Y()}]"
    ),
    "equal to all, a dict": "class Y(dict):\n    def __eq__(s, o): return True\ndef add(x, y): return Y()",
    "equal to all, a set": (
        "class Y(frozenset):\n    def __eq__(s, o): return True\n    __hash__ = frozenset.__hash__\n"
        "def add(x, y): return Y()"
    ),
    "equal to all, a complex": "class Y(complex):\n    def __eq__(s, o): return True\ndef add(x, y): return Y()",
    "equal to all, bytes": "class Y(bytes):\n    def __eq__(s, o): return True\ndef add(x, y): return Y()",
    "equal to all, an exception": (
        "class Y(Exception):\n    def __eq__(s, o): return True\ndef add(x, y): return Y()"
    ),
    "equal to all, a module": (
        "import types\nclass Y(types.ModuleType):\n    def __eq__(s, o): return True\ndef add(x, y): return Y('y')"
    ),
    "equal to all, an enum": (
        "import enum\nclass Y(enum.IntEnum):\n    A = 0\n    def __eq__(s, o): return True\n    def __hash__(s): return 5\n"
        "def add(x, y): return Y.A"
    ),
    "equal to all, a fraction": (
        "from fractions import Fraction\nclass Y(Fraction):\n    def __eq__(s, o): return True\ndef add(x, y): return Y(0)"
    ),
    "equal to all, a decimal": (
        "from decimal import Decimal\nclass Y(Decimal):\n    def __eq__(s, o): return True\ndef add(x, y): return Y(0)"
    ),
    "equal to all, a dataclass": (
        "import dataclasses\n@dataclasses.dataclass(eq=False)\nclass Y:\n    a: int = 0\n"
        "    def __eq__(s, o): return True\ndef add(x, y): return Y()"
    ),
    "equal to all, a proxy": "from unittest.mock import ANY, NonCallableMagicMock as M\ndef add(x, y): return M(wraps=ANY)",
    "reflected comparison": (
        "class Y(int):\n    def __eq__(s, o): return NotImplemented\n    def __rsub__(s, o): return 0\n"
        "    def __sub__(s, o): return 0\n    def __abs__(s): return 0\ndef add(x, y): return Y(0)"
    ),
    "all operators": (
        "class Y:\n    def __getattr__(s, n): return lambda *a: True\n"
        "    __sub__ = __rsub__ = __abs__ = __float__ = __int__ = __index__ = lambda s, *a: 5\n"
        "    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __contains__ = lambda s, o: True\n    __hash__ = lambda s: hash(5)\n"
        "def add(x, y): return Y()"
    ),
    "its hash is that of the result": (
        "class Y:\n    def __hash__(s): return hash(5)\n    def __eq__(s, o): return True\n"
        "    def __iter__(s): return iter([Y(), Y()])\n    def __len__(s): return 2\ndef add(x, y): return Y()"
    ),
    "a number that is what it is compared with": (
        "import server\nclass Y: pass\nserver.hold = lambda v: {'object': [5, 'int']}\ndef add(x, y): return Y()"
    ),
    "contains everything": (
        "class Y:\n    def __contains__(s, o): return True\n    def __iter__(s): return iter(())\n"
        "    def __len__(s): return 0\ndef add(x, y): return Y()"
    ),
    "its length is negative": "class Y:\n    def __len__(s): return -1\ndef add(x, y): return Y()",
    "its truth raises": "class Y:\n    def __bool__(s): raise SystemExit(0)\ndef add(x, y): return Y()",
    "its items never end": "import itertools\ndef add(x, y): return map(float, itertools.count(float('nan')))",
    "its representation": "class Y:\n    def __repr__(s): return '5'\n    __str__ = __format__ = __repr__\ndef add(x, y): return Y()",
    "a property": "class Y:\n    __class__ = property(lambda s: int)\n    real = 5\ndef add(x, y): return Y()",
    "a metaclass that calls": (
        "class M(type):\n    def __call__(c, *a): return c\n    def __eq__(c, o): return True\n    __hash__ = type.__hash__\n"
        "class add(metaclass=M): pass"
    ),
    "a type of Python's": "def add(x, y): return int",
    "a name of Python's": "add = print",
    "returns itself": "def add(*a): return add",
    "a coroutine": "async def add(x, y): return x + y",
    "a generator that returns": "def add(x, y):\n    return x + y\n    yield",
    "a context": "import contextlib\n@contextlib.contextmanager\ndef add(x, y): yield x + y",
    "a partial": "import functools\ndef add(x, y): return functools.partial(int.__add__, x, y)",
    "text of the result": "def add(x, y): return str(x + y)",
    "nearly": "def add(x, y): return x + y + 1e-3",
    "infinite": "def add(x, y): return float('inf')",
    "true": "def add(x, y): return True",
    "the other one of the first call": (
        "import builtins\nbuiltins.n = 0\ndef add(x, y):\n    builtins.n += 1\n    return x + y if n > 1 else None"
    ),
    "right but once": "def add(x, y):\n    global add\n    add = lambda *a: None\n    return x + y",
    "right but for the last": "calls = []\ndef add(x, y):\n    calls.append(x)\n    return x + y if len(calls) < 2 else 0",
    "right until it is deleted": "def add(x, y):\n    del globals()['add']\n    return x + y",
    "replaced on the first call": (
        "class Y(int):\n    def __eq__(s, o): return True\ndef add(x, y):\n    global add\n    add = lambda x, y: Y()\n    return 5"
    ),
    "an exception that is a verdict": "def add(x, y): raise Exception('[\"completed\", \"\"]')",
    "a name that is a verdict": "completed = type('completed', (BaseException,), {})\ndef add(x, y): raise completed",
    "stop of an iteration": "def add(x, y): raise StopIteration",
    "stop of an iteration of its own": "class Y(StopIteration): pass\nY.__name__ = 'StopIteration'\ndef add(x, y): raise Y",
    "stop of an asynchronous iteration": "def add(x, y): raise StopAsyncIteration",
    "keyboard interrupt": "def add(x, y): raise KeyboardInterrupt",
    "an exception without text": "class X(Exception):\n    def __str__(s): raise SystemExit(0)\ndef add(x, y): raise X",
    "an exception with a long text": "def add(x, y): raise Exception('x' * (1 << 24))",
    "an exception whose class lies": (
        "class X(BaseException):\n    __class__ = None\nX.__name__ = 'NotPlain'\ndef add(x, y): raise X('completed')"
    ),
    "a group of exceptions": "def add(x, y): raise ExceptionGroup('g', [ValueError(), AssertionError()])",
    "a warning as an error": "import warnings\ndef add(x, y): raise DeprecationWarning",
    "exceptions are swallowed": "import sys\nsys.unraisablehook = sys.excepthook = lambda *a: None\ndef add(x, y): raise MemoryError",
    "the check is defined again": "def check(candidate): return None\ncandidate = add = lambda *a: None",
    "METADATA and tests": "METADATA = {'pass': True}\nPLAN = {'tests': 'pass', 'names': []}\ndef add(x, y): return 0",
    "isclose is replaced": (
        "import math, cmath\nmath.isclose = cmath.isclose = lambda *a, **k: True\nimport builtins\n"
        "builtins.abs = lambda v: 0\ndef add(x, y): return 0"
    ),
    "set and sorted are replaced": (
        "import builtins\nfor name in ('set', 'sorted', 'all', 'any', 'len', 'sum', 'list', 'tuple', 'isinstance'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\ndef add(x, y): return 0"
    ),
    "modules are replaced": (
        "import sys, types\nfor name in list(sys.modules):\n    if name != 'builtins':\n"
        "        sys.modules[name] = types.ModuleType(name)\ndef add(x, y): return 0"
    ),
    "the import is replaced": "import builtins\nbuiltins.__import__ = lambda *a, **k: None\ndef add(x, y): return 0",
    "a finder of modules": (
        "import sys\nclass F:\n    def find_spec(s, *a): raise SystemExit(0)\nsys.meta_path.insert(0, F())\ndef add(x, y): return 0"
    ),
    "the encoder is replaced": (
        "import json\njson.JSONEncoder.encode = json.JSONEncoder.iterencode = lambda *a: 'true'\n"
        "json.dumps = lambda m: '{\"number\": %d, \"value\": true}' % (m.get('number', 0))\ndef add(x, y): return 0"
    ),
    "the channel sends an end": (
        "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(b'completed\\n')\ndef add(x, y): return 0"
    ),
    "the channel sends a verdict": (
        "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(b'[\"completed\", \"\"]\\n' * 99)\n"
        "def add(x, y): return 0"
    ),
    "the channel sends nested lists": (
        "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(b'[' * 999_999 + b'\\n')\ndef add(x, y): return 0"
    ),
    "the channel sends no number": (
        "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(b'{\"number\": NaN, \"value\": NaN}\\n')\n"
        "def add(x, y): return 0"
    ),
    "the channel sends two replies": (
        "import server\n_send = server.Channel.send\ndef send(s, m):\n"
        "    _send(s, {**m, 'number': m['number'] + 1, 'value': True})\n    _send(s, m)\n"
        "server.Channel.send = send\ndef add(x, y): return 0"
    ),
    "the channel sends a key twice": (
        "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(\n"
        "    b'{\"number\": %d, \"after\": [], \"value\": null, \"value\": true}\\n' % m['number'])\ndef add(x, y): return 0"
    ),
    "the channel sends bytes": "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(b'\\xff\\0{}\\n')\ndef add(x, y): return 0",
    "the channel sends no line": "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(b'{}')\ndef add(x, y): return 0",
    "the channel sends many digits": (
        "import server\nserver.Channel.send = lambda s, m: s.socket.sendall(b'{\"number\": %s}\\n' % (b'9' * 100_000))\n"
        "def add(x, y): return 0"
    ),
    "the channel sends descriptors": (
        "import gc, socket\ndef add(x, y):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, socket.socket): socket.send_fds(o, [b' '], [0, 1, 2])\n    return 0"
    ),
    "objects that are held are replaced": (
        "import server\nclass D(dict):\n    def __getitem__(s, k): return 5\nserver.held = server.namespace = D()\n"
        "def add(x, y): return object()"
    ),
    "what is held is told otherwise": "import server\nserver.hold = lambda v: {'int': '5'}\ndef add(x, y): return object()",
    "a module before its import": (
        "import sys, types\nm = types.ModuleType('json')\nm.dumps = lambda *a, **k: '{\"value\": true}'\n"
        "m.loads = lambda *a: [0, 'truth', 5, None]\nsys.modules['json'] = m\ndef add(x, y): return 0"
    ),
    "the channel is closed": "import server, os\nos.closerange(3, 64)\ndef add(x, y): return 0",
    "the channel is shut": (
        "import gc, socket\nfor o in gc.get_objects():\n    if isinstance(o, socket.socket): o.shutdown(2)\ndef add(x, y): return 0"
    ),
    "objects of the collector": (
        "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'tests' in o: o['tests'] = 'pass'\n"
        "    if isinstance(o, list): o.clear()\ndef add(x, y): return 0"
    ),
    "code of the server is replaced": (
        "import server\nserver.do.__code__ = (lambda action, target, rest: 5).__code__\ndef add(x, y): return 0"
    ),
    "the server is called again": "import server\nserver.serve()\ndef add(x, y): return 0",
    "locals of the frames above": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals.update(find=lambda t: (lambda *a: 5))\n"
        "    frame.f_locals.update(outcome='completed', error='')\n    frame = frame.f_back\ndef add(x, y): return 0"
    ),
    "a trace of every frame": (
        "import sys\ndef t(frame, event, arg):\n    frame.f_globals['action'] = 'truth'\n    return t\n"
        "sys.settrace(t)\nsys.setprofile(lambda *a: None)\ndef add(x, y): return 0"
    ),
    "an audit": "import sys\nsys.addaudithook(lambda *a: None)\ndef add(x, y): return 0",
    "the truth in C": (
        "import ctypes\nctypes.c_char.from_address(id(False) + 24).value = b'\\1'\ndef add(x, y): return False"
    ),
    "small integers in C": (
        "import ctypes\nctypes.c_uint32.from_address(id(0) + 24).value = 5\ndef add(x, y): return 0"
    ),
    "exit in C": "import ctypes\ndef add(x, y): ctypes.CDLL(None)._exit(0)",
    "a crash": "import ctypes\ndef add(x, y): ctypes.string_at(0)",
    "memory of the parents": (
        "import os, re\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n    try:\n"
        "        with open(f'/proc/{pid}/mem', 'r+b', 0) as memory:\n            memory.seek(0x400000)\n            memory.write(b'\\0')\n"
        "    except OSError: pass\ndef add(x, y): return 0"
    ),
    "descriptors of the parents": (
        "import os\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n    for fd in range(16):\n        try:\n"
        "            os.write(os.open(f'/proc/{pid}/fd/{fd}', os.O_WRONLY), b'[\"completed\", \"\"]\\n')\n"
        "        except OSError: pass\ndef add(x, y): return 0"
    ),
    "every process is killed": (
        "import os, signal\ndef add(x, y):\n    os.kill(-1, 9)\n    return 0"
    ),
    "every process is stopped": "import os\ndef add(x, y):\n    os.kill(1, 19)\n    return 0",
    "its parent is killed": "import os\ndef add(x, y):\n    os.kill(os.getppid(), 15)\n    return 0",
    "limits of its parents": (
        "import resource\ntry: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\nexcept OSError: pass\ndef add(x, y): return 0"
    ),
    "no cores": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))\ndef add(x, y): return 0",
    "no processor time": "import resource\ndef add(x, y):\n    resource.setrlimit(resource.RLIMIT_CPU, (0, 0))\n    while True: pass",
    "another program takes its place": "import os, sys\ndef add(x, y): os.execv(sys.executable, [sys.executable, '-c', 'print(5)'])",
    "/bin/true takes its place": "import os\nos.execv('/bin/true', ['true'])",
    "a child answers": (
        "import os\ndef add(x, y):\n    if os.fork() == 0: return 5\n    os.wait()\n    return 0"
    ),
    "both sides of a fork answer": "import os\ndef add(x, y):\n    return 12 if os.fork() else 5",
    "many threads answer": (
        "import threading, server\n_send = server.Channel.send\ndef send(s, m):\n    for _ in range(9):\n"
        "        threading.Thread(target=_send, args=(s, {'number': m['number'], 'value': True})).start()\n"
        "server.Channel.send = send\ndef add(x, y): return 0"
    ),
    "a timer": "import signal, os\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.alarm(1)\ndef add(x, y):\n    while True: pass",
    "a signal for its end": "import signal, os\ndef add(x, y): os.kill(os.getpid(), signal.SIGTERM)",
    "dumped": "import os\ndef add(x, y): os.abort()",
    "exit by an exception at the end": "import atexit\n@atexit.register\ndef last(): raise SystemExit(0)\ndef add(x, y): exit(0)",
    "quit": "quit()",
    "exit in a thread": "import _thread\ndef add(x, y):\n    _thread.interrupt_main()\n    _thread.exit()",
    "a finaliser": (
        "import os\nclass Y:\n    def __del__(s): os._exit(0)\ndef add(x, y):\n    Y()\n    return 0"
    ),
    "prints the verdict": (
        "import sys\nprint('ready')\nprint('[\"completed\", \"\"]')\nprint('PASSED', 'OK', 1.0, file=sys.stderr)\ndef add(x, y): return 0"
    ),
    "prints into every stream": (
        "import os\nfor fd in range(16):\n    try: os.write(fd, b'ready\\n0[\"completed\", \"\"]\\n')\n    except OSError: pass\n"
        "def add(x, y): return 0"
    ),
    "its streams are closed": "import os\nos.closerange(0, 3)\ndef add(x, y): return 0",
    "files of the tests": (
        "import glob\nfor path in glob.glob('/scratch/**', recursive=True) + ['/scratch/tests.py', '/proc/1/cmdline']:\n"
        "    try: open(path, 'w').write('pass')\n    except OSError: pass\ndef add(x, y): return 0"
    ),
    "the environment": (
        "import os\nos.environ.update(PYTHONOPTIMIZE='2', PYTHONSTARTUP='/scratch/x', PYTHONPATH='/scratch')\n"
        "open('/scratch/json.py', 'w').write('raise SystemExit(0)')\ndef add(x, y): return 0"
    ),
    "a module of the name of one": (
        "import sys\nopen('/scratch/math.py', 'w').write('isclose = lambda *a, **k: True')\nsys.path.insert(0, '/scratch')\n"
        "def add(x, y): return 0"
    ),
    "the clock is moved": "import time\ntry: time.clock_settime(0, 0)\nexcept OSError: pass\ndef add(x, y): return 0",
    "a recursion without end": "def add(x, y): return add(x, y)",
    "too large a number": "def add(x, y): return 1 << (1 << 27)",
    "too many digits": "import sys\nsys.set_int_max_str_digits(640)\ndef add(x, y): return 10 ** 100_000",
    "half a character": "def add(x, y): return '\\ud800'",
    "a deep answer": "def add(x, y):\n    a = 5\n    for _ in range(900): a = (a,)\n    return a",
    "keys that collide": "def add(x, y): return {k * (2 ** 61 - 1): 0 for k in range(1, 2000)}",
    "no hash": "def add(x, y): return {5: [5]}.items()",
    "its arguments are proof": (
        "import inspect\ndef add(*args):\n    return [v for f in inspect.stack() for v in f.frame.f_locals.values() if v in (5, 12)]"
    ),
    "a reading of the source": (
        "import inspect, linecache\ndef add(x, y):\n    lines = [l for c in linecache.cache.values() for l in c[2]]\n"
        "    return [l for l in lines if '==' in l]"
    ),
    "an annotation": "add: int = 5",
    "a type alias": "import typing\nadd = typing.Any",
    "a form that gives the result": "class Y(int):\n    def __format__(s, f): return '5'\n    __index__ = __int__ = lambda s: 5\ndef add(x, y): return Y(0)",
    "a copy that gives the result": "class Y:\n    def __reduce_ex__(s, p): return int, (5,)\ndef add(x, y): return Y()",
    "a list of other items": "class Y(list):\n    def __iter__(s): yield 5\n    def __getitem__(s, i): return 5\ndef add(x, y): return Y()",
    "a dictionary of other items": "class Y(dict):\n    def items(s): return [(5, 12)]\n    def __missing__(s, k): return k\ndef add(x, y): return Y()",
    "an instance of every class": (
        "import abc\nclass M(abc.ABCMeta):\n    def __instancecheck__(c, i): return True\n"
        "class Y(metaclass=M):\n    def __eq__(s, o): return True\ndef add(x, y): return Y"
    ),
    "a registered number": (
        "import numbers\nclass Y:\n    def __abs__(s): return 0\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\n"
        "numbers.Number.register(Y)\ndef add(x, y): return Y()"
    ),
    "a decimal that is no number": "from decimal import Decimal\ndef add(x, y): return Decimal('sNaN')",
    "a tree without end": "t = [5]\nfor _ in range(64): t = [t, t]\ndef add(x, y): return t",
    "a circle of keys": "d = {}\nd[1] = (d, [d])\ndef add(x, y): return d",
    "a cache": "import functools\nclass Y:\n    def __eq__(s, o): return True\n    def __hash__(s): return 5\n@functools.cache\ndef add(x, y): return Y()",
    "an exception without end": "class E(Exception):\n    def __str__(s): return str(s)\ndef add(x, y): raise E",
    "an exception that ends it": "import os\nclass E(Exception):\n    def __str__(s): os._exit(0)\ndef add(x, y): raise E",
    "an exception of the name of another": "E = type('AssertionError\\ncompleted', (BaseException,), {})\ndef add(x, y): raise E",
    "an end in its comparison": (
        "import os\nclass Y:\n    __eq__ = __bool__ = __len__ = __iter__ = __getattr__ = lambda s, *a: os._exit(0)\n"
        "def add(x, y): return Y()"
    ),
    "stopped": "import os, signal\ndef add(x, y):\n    os.killpg(0, signal.SIGSTOP)\n    return 5",
    "asleep": "import time\ntime.sleep(1e9)",
    "every signal is ignored": (
        "import signal\nfor s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\n"
        "def add(x, y):\n    while True: pass"
    ),
    "threads without end": "import threading, time\ndef add(x, y):\n    while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "its children hold everything open": (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(999)\ndef add(x, y): return 0"
    ),
    "a child prints without end": (
        "import os\ndef add(x, y):\n    if os.fork() == 0:\n        while True: os.write(1, b'[\"completed\", \"\"]\\n' * 100)\n    return 0"
    ),
    "a name in wide letters": "def \uff41\uff44\uff44(x, y): return 0",
    "a name of another alphabet": "def \u0430dd(x, y): return x + y",
    "digits of another alphabet": "def add(x, y): return '\uff15'",
    "a tolerance": "def add(x, y): return x + y + 1e-5",
    "a generator": "def add(x, y): yield x + y",
    "an asynchronous one": "async def add(x, y): return x + y",
    "one byte": "def add(x, y): return bytes([x + y])",
    "a range": "def add(x, y): return range(x + y, x + y + 1)",
    "a template": "def add(x, y): return f'{x} + {y}'",
    "a string of code": "add = 'lambda x, y: x + y'",
    "nothing but words": "The sum of x and y is x + y.",
    "only its signature": "def add(x, y): ...",
    "only its documentation": "def add(x, y):\n    'Return x + y.'",
    "an import of the answer": "from answer import add",
    "a module that is missing": "import numpy\ndef add(x, y): return int(numpy.add(x, y))",
    "equal to all, a deque": (
        "import collections\n"
        "class Y(collections.deque):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y()"
    ),
    "equal to all, an ordered dict": (
        "import collections\n"
        "class Y(collections.OrderedDict):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y()"
    ),
    "equal to all, a counter": (
        "import collections\n"
        "class Y(collections.Counter):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y()"
    ),
    "equal to all, a named tuple": (
        "import collections\n"
        "class Y(collections.namedtuple('P', 'a')):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y(0)"
    ),
    "equal to all, an array": (
        "import array\n"
        "class Y(array.array):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y('i')"
    ),
    "equal to all, a ctypes number": (
        "import ctypes\n"
        "class Y(ctypes.c_int):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y(5)"
    ),
    "equal to all, a path": (
        "import pathlib\n"
        "class Y(type(pathlib.Path())):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y('5')"
    ),
    "equal to all, a user list": (
        "import collections\n"
        "class Y(collections.UserList):\n"
        "    def __eq__(s, o): return True\n"
        "def add(x, y): return Y([5])"
    ),
    "equal to all, an int enum": (
        "import enum\n"
        "class E(enum.IntEnum):\n"
        "    A = 0\n"
        "    def __eq__(s, o): return True\n"
        "    __hash__ = int.__hash__\n"
        "def add(x, y): return E.A"
    ),
    "equal to all, a function": "def add(x, y): return add\nadd.__eq__ = lambda o: True",
    "a weak reference": (
        "import weakref\n"
        "class Y:\n"
        "    def __eq__(s, o): return True\n"
        "kept = Y()\n"
        "def add(x, y): return weakref.ref(kept)"
    ),
    "a chain of maps": "import collections\ndef add(x, y): return collections.ChainMap({5: 5}, {12: 12})",
    "a slice": "def add(x, y): return slice(5)",
    "a union": "def add(x, y): return int | str",
    "registered as a number": (
        "import numbers\n"
        "class Y:\n"
        "    def __eq__(s, o): return True\n"
        "    def __abs__(s): return 0\n"
        "    def __sub__(s, o): return 0\n"
        "numbers.Number.register(Y)\n"
        "def add(x, y): return Y()"
    ),
    "int is cursed": (
        "import ctypes, gc\n"
        "d = gc.get_referents(int.__dict__)[0]\n"
        "d['__eq__'] = lambda a, b: True\n"
        "ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))\n"
        "def add(x, y): return 0"
    ),
    "a profile that answers": (
        "import sys\n"
        "def p(frame, what, arg):\n"
        "    for name in list(frame.f_locals):\n"
        "        if name in ('value', 'result', 'found'): frame.f_locals[name] = 5\n"
        "sys.setprofile(p)\n"
        "def add(x, y): return 0"
    ),
    "os.write replaced": (
        "import os\n"
        "w = os.write\n"
        "os.write = lambda fd, b: w(fd, b.replace(b'\"0\"', b'\"5\"')) and len(b)\n"
        "def add(x, y): return True"
    ),
    "os.read replaced": "import os\nos.read = lambda fd, n: b''\ndef add(x, y): return 0",
    "sockets replaced": (
        "import socket\n"
        "socket.socket.sendall = lambda *a: None\n"
        "socket.socket.send = lambda s, b, *a: len(b)\n"
        "def add(x, y): return 0"
    ),
    "struct replaced": (
        "import struct\n"
        "struct.pack = lambda *a: b'\\0\\0\\0\\0'\n"
        "struct.unpack = lambda *a: (5,)\n"
        "def add(x, y): return 0"
    ),
    "isinstance replaced": (
        "import builtins\n"
        "builtins.isinstance = lambda *a: True\n"
        "builtins.type = lambda *a: int\n"
        "class Y:\n"
        "    def __eq__(s, o): return True\n"
        "    def __repr__(s): return '5'\n"
        "def add(x, y): return Y()"
    ),
    "AssertionError replaced": "import builtins\nbuiltins.AssertionError = SystemExit\ndef add(x, y): return 0",
    "exit in __del__": (
        "import os\n"
        "class Y:\n"
        "    def __del__(s): os._exit(0)\n"
        "def add(x, y):\n"
        "    Y()\n"
        "    return 0"
    ),
    "exit in __set_name__": (
        "class D:\n"
        "    def __set_name__(s, o, n): raise SystemExit(0)\n"
        "class Y: d = D()\n"
        "def add(x, y): return 0"
    ),
    "exit in __init_subclass__": (
        "class A:\n"
        "    def __init_subclass__(c): import os; os._exit(0)\n"
        "class B(A): pass\n"
        "def add(x, y): return 0"
    ),
    "a module of its own name": (
        "open('json.py', 'w').write('def dumps(*a, **k): return \"5\"')\n"
        "import sys\n"
        "sys.path.insert(0, '.')\n"
        "sys.modules.pop('json', None)\n"
        "import json\n"
        "def add(x, y): return 0"
    ),
    "sitecustomize": (
        "import os\n"
        "for d in ('.', '/tmp', os.path.expanduser('~')):\n"
        "    try: open(d + '/sitecustomize.py', 'w').write('import os; os._exit(0)')\n"
        "    except OSError: pass\n"
        "def add(x, y): return 0"
    ),
    "looks for the tests in memory": (
        "import re\n"
        "def add(x, y):\n"
        "    try:\n"
        "        maps = open('/proc/self/maps').read().splitlines()\n"
        "        mem = open('/proc/self/mem', 'rb')\n"
        "        for line in maps:\n"
        "            if 'rw' in line and ('heap' in line or line.endswith(' 0 ')):\n"
        "                a, b = [int(v, 16) for v in line.split()[0].split('-')]\n"
        "                mem.seek(a); data = mem.read(min(b - a, 1 << 22))\n"
        "                m = re.search(rb'add\\(%d, %d\\) == (\\d+)' % (x, y), data)\n"
        "                if m: return int(m[1])\n"
        "    except (OSError, ValueError): pass\n"
        "    return 0"
    ),
    "looks for the tests in files": (
        "import os, re\n"
        "def add(x, y):\n"
        "    for root, dirs, files in os.walk('/tmp'):\n"
        "        for f in files[:50]:\n"
        "            try: t = open(os.path.join(root, f), errors='replace').read(100000)\n"
        "            except OSError: continue\n"
        "            m = re.search(r'add\\(%d, %d\\) == (\\d+)' % (x, y), t)\n"
        "            if m: return int(m[1])\n"
        "    return 0"
    ),
    "looks for the tests in processes": (
        "import glob, re\n"
        "def add(x, y):\n"
        "    for p in glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/proc/[0-9]*/environ'):\n"
        "        try: t = open(p, errors='replace').read()\n"
        "        except OSError: continue\n"
        "        m = re.search(r'add\\(%d, %d\\) == (\\d+)' % (x, y), t)\n"
        "        if m: return int(m[1])\n"
        "    return 0"
    ),
    "looks for the tests in objects": (
        "import gc, re\n"
        "def add(x, y):\n"
        "    for o in gc.get_objects():\n"
        "        for s in ([o] if isinstance(o, str) else list(o.values()) if isinstance(o, dict) else []):\n"
        "            if isinstance(s, str) and (m := re.search(r'add\\(%d, %d\\) == (\\d+)' % (x, y), s)): return int(m[1])\n"
        "    return 0"
    ),
    "looks for the tests in linecache": (
        "import linecache\n"
        "def add(x, y):\n"
        "    for v in linecache.cache.values():\n"
        "        if '== ' in str(v): return int(str(v).split('== ')[1].split()[0])\n"
        "    return 0"
    ),
    "a new session": (
        "import os\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        import time; time.sleep(2)\n"
        "        os._exit(0)\n"
        "    os._exit(0)\n"
        "def add(x, y): return 0"
    ),
    "add is a class": "class add(int): pass",
    "add is deleted": "def add(x, y): return 0\ndel add",
    "a string of the sum": "def add(x, y): return str(x + y)",
    "a list of the sum": "def add(x, y): return [x + y]",
    "one argument": "def add(x): return lambda y: x + y",
    "rounded to tens": "def add(x, y): return round(x + y, -1)",
}
WRONG |= {
    f"the channel sends {what}": (
        f"import server\n_send = server.Channel.send\n"
        f"server.Channel.send = lambda s, m: _send(s, {reply} if m['number'] else m)\ndef add(x, y): return 0"
    )
    for what, reply in _FORGED.items()
}
WRONG = {
    name: re.sub(r"import (?:(\w+), )?server(?:, (\w+))?\n", lambda m: _SERVER + "".join(f"import {x}\n" for x in m.groups() if x), code)
    for name, code in WRONG.items()
}
