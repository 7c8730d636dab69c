"""Grading of code that a model wrote: programs of HumanEval and MBPP, run in the sandbox, several at a time.

Task files name these functions: a `custom` filter runs every answer of a task at once, so that the sandboxes share the
cores, and `passed` reads what came out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixlens.evals.sandbox import Limits, run_codes

# The slowest of MBPP's own solutions (task 123) needs 3 s of a processor of its own.
LIMITS = Limits(seconds=30.0)
_FENCE = re.compile(r"```(?:[pP]ython|py)?[ \t]*\r?\n(.*?)(?:\r?\n[ \t]*```|\Z)", re.DOTALL)


def humaneval(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """1.0 where prompt and answer pass the problem's check, else 0.0; of a base model, which continues the prompt."""
    return _run(answers, documents, lambda answer, d: _checked(d["prompt"] + answer, d))


def humaneval_chat(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """As `humaneval`, of an instruct model: the code in its answer, whether it repeats the function or only goes on.

    The prompt's own lines (imports, helper functions) stand before an answer that repeats the function.
    """

    def program(answer: str, document: Mapping[str, Any]) -> str:
        code, name = code_in(answer), re.escape(document["entry_point"])
        if not re.search(rf"^(?:async[ ]+)?def[ ]+{name}\b", code, re.MULTILINE):
            return _checked(document["prompt"] + code, document)
        before = re.split(rf"^def[ ]+{name}\b", document["prompt"], maxsplit=1, flags=re.MULTILINE)[0]
        return _checked(f"{before}\n{code}", document)

    return _run(answers, documents, program)


def mbpp(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """1.0 where the answer, alone, passes every test of the problem, behind what the tests need set up."""
    return _run(
        answers, documents, lambda answer, d: "\n".join([code_in(answer), d["test_setup_code"], *d["test_list"], ""])
    )


def passed(references: Sequence[Any], predictions: Sequence[Any], **_: Any) -> float:
    """pass@1 of one problem: the fraction of its answers that passed (Chen et al. 2021, with k = 1)."""
    outcomes = [outcome for one in predictions for outcome in (one if isinstance(one, list | tuple) else [one])]
    return sum(map(float, outcomes)) / len(outcomes)


def code_in(answer: str) -> str:
    """The code in an answer: all up to a fence where it begins as a function's body does, indented; else the first
    fenced block, which may lack its end; else all of it."""
    if answer.lstrip("\r\n")[:1] in (" ", "\t"):
        return answer.split("```")[0]
    found = _FENCE.search(answer)
    return found.group(1) if found else answer


def _checked(code: str, document: Mapping[str, Any]) -> str:
    return f"{code}\n{document['test']}\ncheck({document['entry_point']})\n"


def _run(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]], program: Any) -> list[list[float]]:
    programs = [[program(answer, d) for answer in given] for given, d in zip(answers, documents, strict=True)]
    results = iter(run_codes([one for several in programs for one in several], limits=LIMITS))
    return [[float(next(results).passed) for _ in several] for several in programs]
