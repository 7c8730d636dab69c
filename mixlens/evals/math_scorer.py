"""Grading of worked answers: MATH in either form, and majority votes that leave out answers without a result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_GSM8K = re.compile(r"#### (-?[0-9.,]+)")
_FINAL = re.compile(r"[Tt]he final answer is:?\s*(.+?)\s*(?:\.?\s*I hope it is correct|$)", re.DOTALL)


def grade(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer to a MATH problem is right, by three graders.

    math_equal   the result in either form ("The final answer is ...", else the last box), equal to the gold one after
                 Lewkowycz et al. 2022's normalisation, by sympy, or by math_verify
    exact_match  lm-eval's minerva_math: the form "Final Answer: The final answer is ..." alone
    math_verify  lm-eval's: math_verify on the whole answer, in any form that it finds
    """
    from lm_eval.tasks.minerva_math.utils import process_results

    gold = result_of(document["solution"])
    strict = process_results(dict(document) | {"answer": _normal(gold)}, [results[0]])
    return {
        "math_equal": float(equal(result_of(results[0]), gold)),
        "exact_match": float(strict["exact_match"]),
        "math_verify": float(strict["math_verify"]),
    }


def result_of(text: str) -> str | None:
    """What an answer comes to: after "The final answer is", else in its last box; None where it says neither."""
    from lm_eval.tasks.minerva_math.utils import last_boxed_only_string, remove_boxed

    if found := _FINAL.search(text):
        return found.group(1).strip().rstrip(".")
    boxed = last_boxed_only_string(text)
    return None if boxed is None or not boxed.startswith("\\boxed") else remove_boxed(boxed)


def equal(result: str | None, gold: str | None) -> bool:
    """Whether two results mean the same."""
    from lm_eval.tasks.minerva_math.utils import is_equiv
    from math_verify import parse, verify

    if result is None or gold is None:
        return False
    if is_equiv(_normal(result), _normal(gold)):
        return True
    return bool(verify(parse(_as_math(gold)), parse(_as_math(result))))


def math_majority(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of each document's answers one whose result most of them share; the first of equals."""
    return [_majority(given, lambda text: _normal(result_of(text))) for given in answers]


def gsm8k_majority(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """The number behind #### that most answers of a document share; "" where none has one."""
    return [_number(_majority(given, _number)) for given in answers]


def _number(text: str) -> str:
    found = _GSM8K.search(text)
    return found.group(1).replace(",", "").rstrip(".") if found else ""


def _majority(answers: Sequence[str], result: Any) -> str:
    voted = [(result(answer), answer) for answer in answers]
    counts = Counter(value for value, _ in voted if value)
    if not counts:
        return answers[0]
    winner = counts.most_common(1)[0][0]
    return next(answer for value, answer in voted if value == winner)


def _normal(result: str | None) -> str:
    from lm_eval.tasks.minerva_math.utils import normalize_final_answer

    return "" if result is None else normalize_final_answer(result)


def _as_math(result: str) -> str:
    return result if result.startswith("$") else f"${result}$"
