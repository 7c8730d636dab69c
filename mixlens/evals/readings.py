"""Readings of answers by graders: the form in which an answer was found, and the outcome of a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Outcomes that other limits, or other types that cross between processes, could change.
_TOLD = {
    "not plain": "gave or took what cannot cross between two processes",
    "timeout": "were stopped at the limit of time",
    "memory": "were stopped at the limit of memory",
    "output": "were stopped at the limit of output",
}


class Graded(float):
    """1.0 if the program of an answer passed, else 0.0, with the form in which it was found and its outcome."""

    form: str
    outcome: str

    def __new__(cls, passed: bool, *, form: str, outcome: str) -> Graded:
        graded = super().__new__(cls, passed)
        graded.form, graded.outcome = form, outcome
        return graded


class Found(str):
    """Text found in an answer, with the form that marked it; "" and "none" if nothing was found."""

    form: str

    def __new__(cls, text: str, form: str = "") -> Found:  # lm-eval makes gold answers of the same type
        found = super().__new__(cls, text)
        found.form = form
        return found


def readings_of(filtered: Any) -> list[dict[str, str]]:
    """Return the readings of a task's filters, one per answer."""
    return [
        {"form": one.form} | ({"outcome": one.outcome} if isinstance(one, Graded) else {"found": str(one)})
        for one in _leaves(filtered)
        if isinstance(one, Graded | Found)
    ]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def reading_remarks(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on programs stopped at a limit, and on the forms in which answers were found."""
    readings = [one for record in records for one in record.get("readings") or []]
    ended = Counter(one.get("outcome") for one in readings)
    programs = sum("outcome" in one for one in readings)
    found = [
        f"Graded as wrong: {ended[outcome]} of {programs} programs, which {what}."
        for outcome, what in _TOLD.items()
        if ended[outcome]
    ]
    forms = Counter(one["form"] for one in readings).most_common()
    return [*found, *([f"Answers were found as: {', '.join(f'{form} ({n})' for form, n in forms)}."] if forms else [])]
