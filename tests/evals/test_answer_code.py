"""Code is run as it is meant, in whatever dress it comes: right code passes in each, wrong code in none."""

from __future__ import annotations

import shutil
import textwrap

import pytest

from mixlens.evals import code_scorer as grading
from mixlens.evals.answer_code import program_in

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
PROMPT = (
    "import math\nfrom typing import List\n\n\ndef helper(x):\n    return math.floor(x)\n\n\n"
    'def spread(xs: List[float]) -> int:\n    """Largest minus smallest, rounded down."""\n'
)
BODY = "    if not xs:\n        return 0\n    return helper(max(xs) - min(xs))\n"
WRONG_BODY = BODY.replace("max(xs) - min(xs)", "max(xs)")
PROBLEM = {
    "prompt": PROMPT,
    "entry_point": "spread",
    "test": "def check(candidate):\n    assert candidate([1.0, 4.5]) == 3\n    assert candidate([]) == 0\n",
}


def whole(body: str) -> str:
    return "def spread(xs):\n" + body


def indented(text: str, by: str) -> str:
    return textwrap.indent(text, by)


# {name: the answer with this body}
DRESSES = {
    "bare": whole,
    "the body alone": lambda b: b,
    "the body at the margin": lambda b: textwrap.dedent(b),
    "the prompt again": lambda b: PROMPT + b,
    "fence": lambda b: f"```\n{whole(b)}```",
    "python": lambda b: f"Here it is:\n```python\n{whole(b)}```\nIt subtracts.",
    "python3": lambda b: f"```python3\n{whole(b)}```",
    "PYTHON": lambda b: f"```PYTHON\n{whole(b)}```",
    "py": lambda b: f"```py\n{whole(b)}```",
    "a blank before the tag": lambda b: f"``` python\n{whole(b)}```",
    "braces": lambda b: f"```{{python}}\n{whole(b)}```",
    "braces and attributes": lambda b: f'```{{.python .numberLines startFrom="1"}}\n{whole(b)}```',
    "attributes": lambda b: f'```python title="spread.py"\n{whole(b)}```',
    "a file name": lambda b: f"```spread.py\n{whole(b)}```",
    "blanks behind the fence": lambda b: f"```python   \n{whole(b)}```  \n",
    "tildes": lambda b: f"~~~python\n{whole(b)}~~~",
    "four backticks": lambda b: f"````python\n{whole(b)}````",
    "longer at its end": lambda b: f"```python\n{whole(b)}`````",
    "in a list": lambda b: f"1. The function:\n\n   ```python\n{indented(whole(b), '   ')}   ```\n\n2. Done.",
    "indented fence, code at the margin": lambda b: f"   ```python\n{whole(b)}   ```",
    "no end": lambda b: f"```python\n{whole(b)}",
    "a stray end": lambda b: f"{whole(b)}```\n",
    "a stray end and words": lambda b: f"{whole(b)}```\nThat is all.",
    "the body and an end": lambda b: f"{b}```\nThis subtracts.",
    "the body in a fence": lambda b: f"```python\n{b}```",
    "the prompt again in a fence": lambda b: f"```python\n{PROMPT}{b}```",
    "from __future__ first": lambda b: f"```python\nfrom __future__ import annotations\nimport math\n\n{whole(b)}```",
    "from __future__, bare": lambda b: f"from __future__ import annotations\n{whole(b)}",
    "lines of Windows": lambda b: f"```python\n{whole(b)}```".replace("\n", "\r\n"),
    "a mark of the byte order": lambda b: "\ufeff" + whole(b),
    "one line": lambda b: f"```python spread = lambda xs: {'int(max(xs) - min(xs))' if b == BODY else '4'} ```",
    "blocks before it": lambda b: f"```bash\npip install x\n```\n```python\nimport math\n```\n```python\n{whole(b)}```",
    "a helper in its own block": lambda b: (
        "```python\ndef low(xs):\n    return min(xs)\n```\nThen:\n"
        f"```python\n{whole(b.replace('min(xs)', 'low(xs)'))}```"
    ),
    "an example behind it": lambda b: f"```python\n{whole(b)}```\nUse:\n```python\nprint(spread(undefined))\n```",
    "a console behind it": lambda b: f"```python\n{whole(b)}```\n```\n>>> spread([1, 2])\n1\n```",
    "an example under main": lambda b: (
        f"```python\n{whole(b)}\nif __name__ == '__main__':\n    print(spread(input()))\n```"
    ),
    "a console": lambda b: "".join(
        f"{'>>>' if i == 0 else '...'} {line}\n" for i, line in enumerate(whole(b).splitlines())
    ),
    "words round bare code": lambda b: f"Sure! Here it is.\n\n{whole(b)}\nThis takes O(n) time.\n",
    "words and imports round bare code": lambda b: f"The function:\n\nimport math\n\n{whole(b)}\nI hope it helps!",
    "tags of a model": lambda b: f"[PYTHON]\n{whole(b)}[/PYTHON]",
    "tags of a page": lambda b: f"<code>\n{whole(b)}</code>",
    "done": lambda b: f"[BEGIN]\n{whole(b)}[DONE]",
    "a quotation": lambda b: indented(f"```python\n{whole(b)}```\n", "> ").replace("\n\n", "\n"),
    "all of it indented": lambda b: indented(whole(b), "    "),
    "blanks that do not break": lambda b: f"```python\n{whole(b)}```".replace("    ", "\u00a0" * 4),
    "a type of result": lambda b: f"```python\ndef spread(xs: list) -> int:\n{b}```",
    "a decorator": lambda b: f"```python\nimport functools\n\n@functools.wraps(max)\n{whole(b)}```",
    "under a condition": lambda b: f"```python\nif True:\n{indented(whole(b), '    ')}```",
}  # fmt: skip


def solves(program: str) -> bool:
    """Whether a program (of this file alone) defines the function that was asked for."""
    namespace: dict = {"__name__": "answer"}
    try:
        exec(program, namespace)
        return namespace["spread"]([1.0, 4.5]) == 3 and namespace["spread"]([7.0, 7.5]) == 0
    except (Exception, SystemExit):
        return False


@pytest.mark.parametrize("name", DRESSES)
def test_right_code_is_found_in_every_dress_and_wrong_code_stays_wrong(name):
    assert solves(program_in(DRESSES[name](BODY), ("spread",), PROMPT))
    assert not solves(program_in(DRESSES[name](WRONG_BODY), ("spread",), PROMPT))
    if "body" not in name and name != "one line":  # without a prompt, as in MBPP
        alone = BODY.replace("helper(", "int(")
        assert solves(program_in(DRESSES[name](alone), ("spread",)))
        assert not solves(program_in(DRESSES[name](alone.replace("min(xs)", "1")), ("spread",)))


@needs_bubblewrap
def test_the_graders_run_what_was_found():
    dresses = [DRESSES[name] for name in ("the body at the margin", "from __future__ first", "in a list")]
    for body, expected in ((BODY, 1.0), (WRONG_BODY, 0.0)):
        assert grading.humaneval_chat([[dress(body) for dress in dresses]], [PROBLEM]) == [[expected] * 3]
    mbpp = {"test_setup_code": "", "test_list": ["assert spread([1, 5]) == 4"]}
    assert grading.mbpp([[DRESSES["a console"]("    return max(xs) - min(xs)\n")]], [mbpp]) == [[1.0]]


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```python\n```", "x = ("])
def test_an_answer_without_the_function_is_left_as_it_stands(answer):
    assert program_in(answer, ("spread",), PROMPT) == PROMPT + answer
    assert program_in(answer, ("spread",)) == answer


def test_an_answer_with_another_function_is_left_as_it_stands():
    assert program_in("def other(xs):\n    return 0\n", ("spread",)) == "def other(xs):\n    return 0\n"


def test_the_first_block_that_defines_the_function_is_taken():
    answer = "```python\ndef f(): return 1\n```\nor\n```python\ndef f(): return 2\n```"
    assert program_in(answer, ("f",)).strip() == "def f(): return 1"
    both = "```python\nclass Node: pass\n```\n```python\ndef f(): return Node()\n```"
    assert "class Node" in program_in(both, ("Node", "f"))


@pytest.mark.parametrize(
    "text", ["(" * 100_000, "x = " + "-" * 100_000 + "1", "[" * 5_000 + "]" * 5_000, "\0", "\ud800"]
)
def test_code_that_no_parser_takes_is_left_as_it_stands(text):
    assert program_in(text, ("f",)) == text
