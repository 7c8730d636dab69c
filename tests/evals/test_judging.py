"""The judge and the judged are apart: no answer that does not solve its task is passed, whatever it does."""

from __future__ import annotations

import json
import shutil

import pytest

from mixlens.evals import code_scorer as grading
from mixlens.evals.sandbox import Check, Limits, run_check, run_checks

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

LIMITS = Limits(seconds=20)
ADD = "assert add(2, 3) == 5\nassert add(5, 7) == 12"
# Each defines an `add` that does not add, and then tries to be passed.
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
        "import __main__\nfor name in ('packed', 'unpacked', 'do', 'find'):\n"
        "    setattr(__main__, name, lambda *a: 5)\ndef add(x, y): return 0"
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
}


def test_a_right_answer_passes():
    assert run_check(Check("def add(x, y): return x + y", ADD, ("add",)), limits=LIMITS).passed


def test_no_answer_passes_without_solving_the_task():
    checks = [Check(f"{code}\n", ADD, ("add",)) for code in WRONG.values()]
    results = dict(zip(WRONG, run_checks(checks, limits=LIMITS), strict=True))
    assert [name for name, result in results.items() if result.passed] == []
    assert {result.outcome for result in results.values()} <= {"raised", "exited", "not plain", "output", "memory"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["humaneval", "humaneval_chat", "mbpp"])
def test_no_answer_passes_in_the_form_of_a_benchmark(form):
    prompt = "def add(x, y):\n"
    first, second = ADD.splitlines()
    problem = {
        "prompt": prompt, "entry_point": "add", "test": f"def check(candidate):\n    {first}\n    {second}\n",
        "test_setup_code": "", "test_list": [first, second],
    }  # fmt: skip
    before = "    return 0\n\n" if form == "humaneval" else ""
    graded = getattr(grading, form)([[before + code for code in WRONG.values()]], [problem])
    assert dict(zip(WRONG, graded[0], strict=True)) == dict.fromkeys(WRONG, 0.0)


def test_handed_answers_fail_and_right_ones_pass(shared):
    cases = json.loads((shared / "cases" / "sandbox" / "wrong_solutions.json").read_text("utf-8"))
    right = {"HumanEval": "    return x + y\n", "MBPP": "def sim(a, b): return tuple(set(a) & set(b))"}
    for form, grade in (("HumanEval", grading.humaneval), ("MBPP", grading.mbpp)):
        wrong = cases[form]["wrong_solutions"]
        outcomes = grade([[*wrong.values(), right[form]]], [cases[form]["task"]])[0]
        assert dict(zip(wrong, outcomes[:-1], strict=True)) == dict.fromkeys(wrong, 0.0)
        assert outcomes[-1] == 1.0


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-1", "10**4000", "-0.0", "float('inf')", "1e-320", "1 + 2j", "'a\\ud800é\\n'", "b'\\x00\\xff'",
        "bytearray(b'ab')", "[1, [2.5, None]]", "(1, (2,), [])", "{1, 2, 3}", "frozenset({1, 2})",
        "{1: 'a', (2, 3): {'b': [True]}, None: {}}", "''", "()", "[True, 1, 1.0]", "int", "ValueError",
    ],
)  # fmt: skip
def test_plain_values_cross_both_ways_with_their_types(value):
    tests = (
        f"value = {value}\nback = same(value)\n"
        "assert type(back) is type(value) and back == value and repr(back) == repr(value), back\nassert known(value)"
    )
    answer = f"def same(x): return x\ndef known(x): return type(x) is type({value}) and repr(x) == repr({value})"
    result = run_check(Check(answer, tests, ("same", "known")), limits=LIMITS)
    assert (result.outcome, result.error) == ("completed", "")


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        ("def f(items): items.append(len(items))", "items = [0]\nf(items)\nassert items == [0, 1]"),
        ("def f(items): items['b'] = items.pop('a')", "items = {'a': 1}\nf(items)\nassert items == {'b': 1}"),
        ("def f(items): items.clear()", "items = {1, 2}\nf(items)\nassert items == set()"),
        ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2] and len(tuple(f(2))) == 2"),
        ("def f(n): return lambda m: n + m", "assert f(2)(3) == 5"),
        ("def f(x): raise KeyError(x)", "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False"),
        ("import collections as c\nP = c.namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "assert f() == (1, 2)"),
        ("from collections import Counter\ndef f(s): return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("import re\ndef f(s): return re.match('a', s)", "assert f('ab') and not f('b')"),
        (
            "class f:\n    def __init__(s, v): s.v = v\n"
            "    def total(s): return s.v + (s.next.total() if s.next else 0)",
            "one, two = f(1), f(2)\none.next, two.next = two, None\nassert one.total() == 3 and two.v == 2",
        ),
    ],
    ids=["list", "dict", "set", "generator", "closure", "exception", "namedtuple", "counter", "truth", "objects"],
)  # fmt: skip
def test_honest_answers_of_every_form_pass(answer, tests):
    result = run_check(Check(answer, tests, ("f",)), limits=LIMITS)
    assert (result.outcome, result.error) == ("completed", "")


def test_what_has_no_plain_form_is_an_outcome_of_its_own():
    result = run_check(Check("def f(): return object()", "assert f() == 1", ("f",)), limits=LIMITS)
    assert result.outcome == "not plain"
    assert "object" in result.error
    assert run_check(Check("def f(g): return 1", "f(lambda: 1)", ("f",)), limits=LIMITS).outcome == "not plain"


def test_expected_values_and_tests_never_enter_the_other_side():
    """The answer looks through its whole memory, for a text of which it holds the two halves apart."""
    spy = """
import ctypes, re
def f(x):
    found = 0
    for low, high in re.findall(r'^(\\w+)-(\\w+) rw', open('/proc/self/maps').read(), re.MULTILINE):
        content = ctypes.string_at(int(low, 16), int(high, 16) - int(low, 16))
        found += sum(part[:3][::-1] == b'kvw' for part in content.split(b'qzj')[1:])
    return found
"""
    limits = Limits(seconds=60, memory_bytes=2 << 30)
    assert run_check(Check(spy, "expected = 'qzjwvk'\nassert f(1) == 0", ("f",)), limits=limits).error == ""
    assert run_check(Check(spy, "assert f('qzjwvk') > 0", ("f",)), limits=limits).error == ""  # a spy that finds


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("def f():\n    while True: pass", "timeout"),
        ("def f(): return bytearray(4 << 30)", "memory"),
        ("def f():\n    while True: print('x' * 9999)", "output"),
        ("def f(): return 'x' * (1 << 25)", "output"),
        ("def f(): raise SystemExit", "exited"),
        ("import os\ndef f(): os._exit(3)", "exited"),
        ("def g(): pass", "raised"),
    ],
)
def test_how_a_check_ended_is_told(answer, outcome):
    limits = Limits(seconds=1) if outcome == "timeout" else LIMITS
    assert run_check(Check(answer, "f()", ("f",)), limits=limits).outcome == outcome


def test_what_the_answer_prints_is_kept():
    result = run_check(Check("def f(): print('said é')", "f()", ("f",)), limits=LIMITS)
    assert (result.outcome, result.stdout) == ("completed", "said é\n")


def test_names_tested_are_those_of_the_answer():
    assert grading.names_tested("import math\nassert set(sim((1, 2))) == set((4, 5)) and math.pi") == (("sim",), ())
    assert grading.names_tested("assert sum(10, 15) == 6") == (("sum",), ())  # MBPP 126: the answer's own sum
    assert grading.names_tested("assert size((1,)) == sys.getsizeof((1,))") == (("size",), ("sys",))  # 596
    assert grading.names_tested("a = Node(1)\nassert all(f(x) == a for x in (lambda y: [y])(2))") == (("Node", "f"), ())


def test_helpers_of_the_prompt_are_the_judge_s_own():
    problem = {
        "prompt": 'def twice(x):\n    return 2 * x\n\n\ndef half(x):\n    """The half."""\n', "entry_point": "half",
        "test": "def check(candidate):\n    assert candidate(twice(4)) == 4\n",
    }  # fmt: skip
    forged = "    return 0\n\ndef twice(x): return 0\n"
    right = "    return x // 2\n"
    assert grading.humaneval([[right, forged, right + forged.lstrip()]], [problem]) == [[1.0, 0.0, 0.0]]


def test_memory_outside_any_process_s_count_and_other_doors_are_closed():
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(value):
    return value == -1
def f():
    try:
        os.memfd_create('x')
        return 'memfd'
    except OSError:
        pass
    calls = {'shmget': lambda: libc.shmget(0, 1 << 20, 0o1600), 'unshare': lambda: libc.unshare(0x10000000),
             'ptrace': lambda: libc.ptrace(0, 0, 0, 0), 'adjtimex': lambda: libc.adjtimex(None)}
    open_ones = len(os.listdir('/proc/self/fd'))  # its three streams, the channel, and the folder that is read
    return [name for name, call in calls.items() if not refused(call())] + ['descriptors'] * (open_ones != 5)
"""
    assert run_check(Check(program, "assert f() == [], f()", ("f",)), limits=LIMITS).outcome == "completed"
