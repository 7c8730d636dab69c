"""Grading of generated code: gold passes, everything else fails, and each answer is graded on its own."""

from __future__ import annotations

import json
import shutil

import pytest

from mixlens.evals import code_scorer as grading
from mixlens.evals import data

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

PROMPT = 'import math\n\n\ndef area(r):\n    """Area of a disc."""\n'
PROBLEM = {
    "prompt": PROMPT,
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(2) - 12.566) < 0.01\n    assert candidate(0) == 0\n",
}
BODY = "    return math.pi * r * r\n"


def test_answers_of_a_base_model_go_on_with_the_prompt():
    answers = [BODY, "    return 3 * r * r\n", "    return math.pi *", "    raise SystemExit\n", "", BODY + "exit_()\n"]
    assert grading.humaneval([answers], [PROBLEM]) == [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_answers_of_an_instruct_model_are_code_in_words():
    whole = "def area(r):\n" + BODY
    answers = [
        f"Here it is:\n```python\n{whole}```\nHope it helps.",
        f"```\n{PROMPT}{BODY}```",
        BODY,
        f"{BODY}```\nThis multiplies.",
        f"```python\n{whole}",
        "I cannot do that.",
        "```python\ndef area(r):\n    return r\n```",
    ]
    assert grading.humaneval_chat([answers], [PROBLEM]) == [[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]


def test_mbpp_answers_stand_alone():
    problem = {"test_list": ["assert twice(2) == 4", "assert twice(ZERO) == 0"], "test_setup_code": "ZERO = 0"}
    right = "def twice(n):\n    return 2 * n"
    answers = [[right, "def twice(n):\n    return 4", f"```python\n{right}\n```", ""]]
    assert grading.mbpp(answers, [problem]) == [[1.0, 0.0, 1.0, 0.0]]


def test_pass_at_1_is_the_fraction_of_answers_that_pass():
    assert grading.passed([None], [[1.0, 0.0, 0.0, 1.0]]) == 0.5
    assert grading.passed([None], [1.0]) == 1.0


@pytest.mark.slow
def test_all_gold_solutions_of_mbpp_pass(shared):
    lines = (shared / "data" / "mbpp" / "mbpp.jsonl").read_text("utf-8").splitlines()
    rows = [data._mbpp_row(json.loads(line)) for line in lines]
    graded = grading.mbpp([[row["code"]] for row in rows], rows)
    assert len(rows) == 974
    assert [row["task_id"] for row, outcome in zip(rows, graded, strict=True) if outcome != [1.0]] == []
