"""The judge and the judged are apart: no answer that does not solve its task is passed, whatever it does."""

from __future__ import annotations

import json
import shutil

import pytest
from wrong_answers import WRONG

from mixlens.evals import code_scorer as grading
from mixlens.evals.sandbox import Check, Limits, run_check, run_checks

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

LIMITS = Limits(seconds=20)
ADD = "assert add(2, 3) == 5\nassert add(5, 7) == 12"


# Ways in which tests use what they are given; every one asks for two sums.
TESTS = {
    "equal": ADD,
    "all of a map": "cases = [(2, 3, 5), (5, 7, 12)]\nassert all(map(lambda c: add(c[0], c[1]) == c[2], cases))",
    "a loop over a map": "got = []\nfor r in map(add, (2, 5), (3, 7)): got.append(r)\nassert got == [5, 12]",
    "close": "import math\nassert math.isclose(add(2, 3), 5) and math.isclose(add(5, 7), 12)",
    "distance": "assert abs(add(2, 3) - 5) < 1e-6 and abs(add(5, 7) - 12) < 1e-6",
    "containers": "assert [add(2, 3), {1: add(5, 7)}] == [5, {1: 12}]",
    "sets": "assert set([add(2, 3), add(5, 7)]) == {12, 5} and sorted([add(5, 7), add(2, 3)]) == [5, 12]",
    "member": "assert add(2, 3) in (5,) and add(5, 7) in {12: 0} and add(5, 7) in [12]",
    "key": "assert {5: 'a', 12: 'b'}[add(2, 3)] == 'a' and 'abcdefghijklm'[add(5, 7)] == 'm'",
    "text": "assert f'{add(2, 3)} {add(5, 7)!r}' == '5 12'",
    "not": "assert not add(2, 3) != 5 and not (add(5, 7) < 12 or add(5, 7) > 12)",
    "raises": "assert add(2, 3) == 5\ntry:\n    add(None, 1)\nexcept TypeError:\n    pass\nelse:\n    assert False",
}
STOPPED = Limits(seconds=5, memory_bytes=256 << 20)


def test_there_are_many_wrong_answers_and_a_right_one_passes_whatever_way_it_is_tested():
    assert len(WRONG) >= 200
    checks = [Check("def add(x, y): return x + y", tests, ("add",)) for tests in TESTS.values()]
    results = run_checks(checks, limits=LIMITS)
    assert [(name, r.error) for name, r in zip(TESTS, results, strict=True) if not r.passed] == []


def passed_ones(asked: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of (wrong answer, tests), those that passed."""
    checks = [Check(f"{WRONG[answer]}\n", TESTS[tests], ("add",)) for answer, tests in asked]
    results = run_checks(checks, limits=STOPPED)
    known = {"completed", "raised", "exited", "not plain", "output", "memory", "timeout"}
    assert {result.outcome for result in results} <= known
    return [one for one, result in zip(asked, results, strict=True) if result.passed]


def test_no_answer_passes_without_solving_the_task():
    """One in four; all of them in the slow tests."""
    assert passed_ones([(answer, "equal") for answer in list(WRONG)[::4]]) == []


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(3))
def test_no_answer_passes_whatever_way_it_is_tested(shift):
    ways = list(TESTS)
    assert passed_ones([(answer, ways[(n + 4 * shift) % len(ways)]) for n, answer in enumerate(WRONG)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["humaneval", "humaneval_chat", "mbpp"])
def test_no_answer_passes_in_the_form_of_a_benchmark(form, monkeypatch):
    prompt = "def add(x, y):\n"
    first, second = ADD.splitlines()
    problem = {
        "prompt": prompt, "entry_point": "add", "test": f"def check(candidate):\n    {first}\n    {second}\n",
        "test_setup_code": "", "test_list": [first, second],
    }  # fmt: skip
    before = "    return 0\n\n" if form == "humaneval" else ""
    monkeypatch.setattr(grading, "LIMITS", STOPPED)
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
    answer = (
        f"import copy\nsame = copy.deepcopy\ndef known(x): return type(x) is type({value}) and repr(x) == repr({value})"
    )
    result = run_check(Check(answer, tests, ("same", "known")), limits=LIMITS)
    assert (result.outcome, result.error) == ("completed", "")


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        ("def f(items): items.append(len(items))", "items = [0]\nf(items)\nassert items == [0, 1]"),
        ("def f(items): items['b'] = items.pop('a')", "items = {'a': 1}\nf(items)\nassert items == {'b': 1}"),
        ("def f(items): items.clear()", "items = {1, 2}\nf(items)\nassert items == set()"),
        (
            "def f(rows):\n    for row in rows: row.sort()\n    rows.reverse()",
            "row = [3, 1]\nrows = [row, [2], row]\nf(rows)\nassert rows == [[1, 3], [2], [1, 3]] and rows[0] is row",
        ),
        ("def f(pair): pair[0].append(pair[1].pop('a'))", "pair = ([], {'a': 1})\nf(pair)\nassert pair == ([1], {})"),
        ("def f(m): m[0][0] = 1", "m = [[0] * 2] * 2\nf(m)\nassert m == [[1, 0], [1, 0]]"),
        ("def f(a, b): a.extend(b)", "a = [1]\nf(a, a)\nassert a == [1, 1]"),
        ("def f(a): 1 / a.pop()", "a = [0]\ntry: f(a)\nexcept ZeroDivisionError: pass\nassert a == []"),
        ("def f(a): return a", "a = []\nassert f(a) is a"),
        ("def f(a): return a[:]", "a = []\nassert f(a) is not a and f(a) == a"),
        ("def f(a):\n    a.append(a)\n    return {1: a}", "a = []\nassert f(a)[1] is a and a[0] is a"),
        ("def f(a): a['a'] += 1", "import collections\na = collections.Counter('a')\nf(a)\nassert a['a'] == 2"),
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
    ids=[
        "list", "dict", "set", "nested", "in a tuple", "one twice", "given twice", "before it raises", "the same",
        "a copy", "a circle", "of a subclass", "generator", "closure", "exception", "namedtuple", "counter", "truth",
        "objects",
    ],
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
