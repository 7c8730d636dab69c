"""Code is run as it is meant, in whatever dress it comes: right code passes in each, wrong code in none."""

from __future__ import annotations

import html
import json
import shutil
import textwrap

import pytest

from mixlens.evals import code_scorer as grading
from mixlens.evals.answer_code import AS_IT_STANDS, program_in

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
    "escaped for a page": lambda b: f"<pre><code class='language-python'>\n{html.escape(whole(b))}</code></pre>",
    "tags in its lines": lambda b: f"<code>{whole(b)}</code>",
    "a tag round a fence": lambda b: f"<answer>\n```python\n{whole(b)}```\n</answer>",
    "LaTeX": lambda b: f"\\begin{{verbatim}}\n{whole(b)}\\end{{verbatim}}",
    "the word python": lambda b: f"python\n{whole(b)}",
    "JSON": lambda b: json.dumps({"language": "python", "code": whole(b)}),
    "JSON in a fence": lambda b: f"```json\n{json.dumps({'code': whole(b)}, indent=1)}\n```",
    "escaped ends of lines": lambda b: whole(b).replace("\n", "\\n"),
    "numbered lines": lambda b: "\n".join(f"{n:3} {line}" for n, line in enumerate(whole(b).splitlines(), 1)),
    "a patch": lambda b: "".join(f"+{line}\n" for line in whole(b).splitlines()),
    "IPython": lambda b: "".join(
        f"{'In [1]:' if i == 0 else '   ...:'} {line}\n" for i, line in enumerate(whole(b).splitlines())
    ),
    "a console in a fence": lambda b: "```pycon\n" + DRESSES["a console"](b) + ">>> spread([])\n0\n```",
    "words and indented code": lambda b: f"Here it is:\n\n{indented(whole(b), '    ')}\nThat is all.",
    "the signature first": lambda b: f"```\ndef spread(xs):\n    ...\n```\nso:\n```python\n{whole(b)}```",
    "the prompt first": lambda b: f"```python\n{PROMPT}```\nbecomes\n```python\n{whole(b)}```",
    "a remark on a name": lambda b: f"`spread` calls `def low(x): pass`.\n\n{whole(b)}\nDone.",
    "old ends of lines": lambda b: whole(b).replace("\n", "\r"),
    "blanks without width": lambda b: f"```python\n\u200b{whole(b)}```",
    "text after an unclosed fence": lambda b: f"```python\n{whole(b)}\nThis is what was asked for.",
    "HTML in words": lambda b: f"<p>Here:</p>\n```python\n{whole(b)}```\n<p>if a &lt; b</p>",
    "code behind the fences' marks": lambda b: f"Here: ```{whole(b).rstrip()}```",
    "code before the fence's end": lambda b: f"```python\n{whole(b).rstrip()}```",
    "the word python in a fence": lambda b: f"```\npython\n{whole(b)}```",
    "a text of JSON": lambda b: json.dumps(whole(b)),
    "JSON in JSON": lambda b: json.dumps([{"type": "code", "answer": {"text": whole(b)}}]),
    "JSON among words": lambda b: f"In JSON:\n{json.dumps({'code': whole(b)})}\nDone.",
    "a fence in JSON": lambda b: json.dumps({"response": f"So:\n```python\n{whole(b)}```"}),
    "a notebook": lambda b: json.dumps({"cells": [{"cell_type": "code", "source": whole(b).splitlines(True)}]}),
    "escaped ends of lines and quotes": lambda b: (whole(b) + 'x = "\\n"\n').replace("\\", "\\\\").replace("\n", "\\n"),
    "a token of the end": lambda b: f"{whole(b)}<|endoftext|>",
    "a tag of the end": lambda b: f"{whole(b)}</s>",
    "thought before it": lambda b: f"<think>\n```\ndef spread(xs):\n    return 0\n```\n</think>\n```\n{whole(b)}```",
    "blanks of Unicode": lambda b: f"```python\n{whole(b)}```".replace("    ", "\u2003" * 4),
    "quotes of a printer": lambda b: f"```python\n{whole(b)}print(\u201cdone\u201d)\n```",
    "numbers and bars": lambda b: "\n".join(f"{n:3} | {line}" for n, line in enumerate(whole(b).splitlines(), 1)),
    "a method": lambda b: f"```python\nclass Solution:\n    def spread(self, xs):\n{indented(b, '    ')}```",
    "a static method": lambda b: f"class Solution:\n    @staticmethod\n    def spread(xs):\n{indented(b, '    ')}",
    "the body without its first blanks": lambda b: b.lstrip(),
    "a signature that raises": lambda b: (
        f"```\ndef spread(xs):\n    raise NotImplementedError\n```\nso:\n```python\n{whole(b)}```"
    ),
    "a directive": lambda b: f".. code-block:: python\n\n{indented(whole(b), '    ')}\nDone.",
    "Org": lambda b: f"#+BEGIN_SRC python\n{whole(b)}#+END_SRC",
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
    assert solves(program_in(DRESSES[name](BODY), ("spread",), PROMPT).source)
    assert not solves(program_in(DRESSES[name](WRONG_BODY), ("spread",), PROMPT).source)
    if "body" not in name and "prompt" not in name and name != "one line":  # without a prompt, as in MBPP
        alone = BODY.replace("helper(", "int(")
        assert solves(program_in(DRESSES[name](alone), ("spread",)).source)
        assert not solves(program_in(DRESSES[name](alone.replace("min(xs)", "1")), ("spread",)).source)


@needs_bubblewrap
def test_the_graders_run_what_was_found():
    dresses = [DRESSES[name] for name in ("the body at the margin", "from __future__ first", "in a list")]
    for body, expected in ((BODY, 1.0), (WRONG_BODY, 0.0)):
        assert grading.humaneval_chat([[dress(body) for dress in dresses]], [PROBLEM]) == [[expected] * 3]
    mbpp = {"test_setup_code": "", "test_list": ["assert spread([1, 5]) == 4"]}
    assert grading.mbpp([[DRESSES["a console"]("    return max(xs) - min(xs)\n")]], [mbpp]) == [[1.0]]


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```python\n```", "x = (", "def spread(xs):\n    pass\n"])
def test_an_answer_without_the_function_is_left_as_it_stands(answer):
    assert program_in(answer, ("spread",), PROMPT) == (PROMPT + answer, AS_IT_STANDS)
    assert program_in(answer, ("spread",)) == (answer, AS_IT_STANDS)


def test_an_answer_with_another_function_is_left_as_it_stands():
    for answer in ("def other(xs):\n    return 0\n", "class Solution:\n    def other(self, xs):\n        return 0\n"):
        assert program_in(answer, ("spread",)) == (answer, AS_IT_STANDS)


def test_a_function_comes_before_a_method_of_its_name():
    method = "class Solution:\n    def spread(self, xs):\n        return 0\n"
    assert "Solution()" in program_in(method, ("spread",)).source
    both = f"```python\n{method}```\nbetter:\n```python\ndef spread(xs):\n    return 1\n```"
    assert "Solution()" not in program_in(both, ("spread",)).source


def test_the_first_block_that_defines_the_function_is_taken():
    answer = "```python\ndef f(): return 1\n```\nor\n```python\ndef f(): return 2\n```"
    assert program_in(answer, ("f",)).source.strip() == "def f(): return 1"
    both = "```python\nclass Node: pass\n```\n```python\ndef f(): return Node()\n```"
    assert "class Node" in program_in(both, ("Node", "f")).source


def test_the_form_is_told():
    forms = {name: program_in(DRESSES[name](BODY), ("spread",), PROMPT).form for name in DRESSES}
    assert forms["python"] == forms["tildes"] == "fenced block"
    assert forms["a helper in its own block"] == "fenced blocks joined"
    assert forms["bare"] == "bare"
    assert forms["the body alone"] == "body of the prompt"
    assert AS_IT_STANDS not in forms.values()


HOSTILE = {
    "parentheses": "(" * 100_000,
    "minus": "x = " + "-" * 100_000 + "1",
    "brackets": "[" * 5_000 + "]" * 5_000,
    "NUL": "\0",
    "half a character": "\ud800",
    "ticks": "`" * 262_000,
    "fences": "```\n" * 60_000,
    "tildes and ticks": "``` a ~~~ " * 20_000,
    "tags": "<code " * 40_000,
    "lines that begin as code does": "\n".join(f"x{i} = {i}" for i in range(499)) + "\n((",
    "quotations": "> def g(x):\n" * 20_000,
    "a long end": ("def g(x):\n    return (x + 1) * 2\n" * 250)[:-5],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_code_that_no_parser_takes_is_left_as_it_stands(name):
    assert program_in(HOSTILE[name], ("f",)) == (HOSTILE[name], AS_IT_STANDS)
