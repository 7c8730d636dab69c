"""Grading of worked answers to MATH and GSM8K in any form, and majority votes over answers with a result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mixlens.evals.final_answer import LAST_LINE, as_latex, final_answer, number_in
from mixlens.evals.readings import Found

_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}\b")


def grade(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Grade an answer to a MATH problem with three graders.

    math_equal   the result in any form (see final_answer) equals the gold one after the normalisation of Lewkowycz et
                 al. 2022, by sympy, or by math_verify
    exact_match  minerva_math of lm-eval: accepts only the form "Final Answer: The final answer is ..."
    math_verify  math_verify of lm-eval on the whole answer, in any form that it finds
    """
    from lm_eval.tasks.minerva_math.utils import process_results

    gold = final_answer(document["solution"])
    strict = process_results(dict(document) | {"answer": _normal(gold)}, [results[0]])
    return {
        "math_equal": float(equal(result_of(results[0]), gold)),
        "exact_match": float(strict["exact_match"]),
        "math_verify": float(strict["math_verify"]),
    }


def read(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[Found]]:
    """Return every answer unchanged, with the form of its final answer."""
    return [[Found(text, result_of(text).form) for text in given] for given in answers]


def result_of(text: str) -> Found:
    """Return the result of an answer to a MATH problem; for an unmarked last line of prose, the number in it."""
    found = final_answer(text)
    if found.form == LAST_LINE and _WORD.search(found):
        return Found(number_in(found), found.form)
    return found


def equal(result: str, gold: str) -> bool:
    """Check whether two results are mathematically equal."""
    from lm_eval.tasks.minerva_math.utils import is_equiv
    from math_verify import parse, verify

    if not result or not gold:
        return False
    result = as_latex(result)
    if is_equiv(_normal(result), _normal(gold)):
        return True
    return bool(verify(parse(_as_math(gold)), parse(_as_math(result))))


def math_majority(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[Found]:
    """Return for each document the first answer with the most frequent result."""
    voted = [_majority(given, lambda text: _normal(as_latex(result_of(text)))) for given in answers]
    return [Found(text, result_of(text).form) for text in voted]


def gsm8k(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[Found]]:
    """Return the final number of every answer, in any form; "" if it has none."""
    return [[_number(text) for text in given] for given in answers]


def gsm8k_majority(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[Found]:
    """Return the most frequent final number of each document's answers; "" if no answer has one."""
    return [_number(_majority(given, _number)) for given in answers]


def _number(text: str) -> Found:
    found = final_answer(text)
    return Found(number_in(found), found.form)


def _majority(answers: Sequence[str], result: Callable[[str], str]) -> str:
    voted = [(result(answer), answer) for answer in answers]
    counts = Counter(value for value, _ in voted if value)
    if not counts:
        return answers[0]
    winner = counts.most_common(1)[0][0]
    return next(answer for value, answer in voted if value == winner)


def _normal(result: str) -> str:
    from lm_eval.tasks.minerva_math.utils import normalize_final_answer

    return normalize_final_answer(result)


def _as_math(result: str) -> str:
    return result if result.startswith("$") else f"${result}$"
