"""A small multiple-choice benchmark, written for this project, that the demo model can pass.

`python -m mixlens.evals.demo_items` rewrites demo_items.jsonl from demo_text.json reproducibly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

ITEMS = Path(__file__).with_name("demo_items.jsonl")
_TEXT = Path(__file__).with_name("demo_text.json")
_CLOSING = {"(": ")", "[": "]", "{": "}"}

Item = tuple[str, str, list[str]]  # question, right choice, wrong choices


def load(subject: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the items of one subject: question, choices, answer (index of the right choice). Split test."""
    rows = [json.loads(line) for line in ITEMS.read_text("utf-8").splitlines()]
    return {"test": datasets.Dataset.from_list([row for row in rows if row["subject"] == subject])}


def items() -> Iterator[dict[str, Any]]:
    """Yield every item with shuffled choices; the positions of the right choice are evenly distributed."""
    text = json.loads(_TEXT.read_text("utf-8"))
    for subject, make in SUBJECTS.items():
        draw = random.Random(subject)
        for number, (question, right, wrong) in enumerate(make(text, draw)):
            choices = list(wrong)
            draw.shuffle(choices)
            place = number % (len(wrong) + 1)
            choices.insert(place, right)
            yield {"subject": subject, "question": question, "choices": choices, "answer": place}


def languages(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Yield beginnings of sentences; the wrong choices are the continuation in four other languages."""
    for parallel in text["languages"]:
        for language, (start, end) in parallel.items():
            yield start, end, [other for name, (_, other) in parallel.items() if name != language]


def registers(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Yield beginnings of a novel, an abstract, LaTeX, code or exercises, to be continued in the same style."""
    by_register = text["registers"]
    for register, pairs in by_register.items():
        for start, end in pairs:
            yield start, end, [draw.choice(others)[1] for name, others in by_register.items() if name != register]


def phrases(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Yield fixed expressions without their last word; the wrong choices are last words of others."""
    ends = sorted({end for _, end in text["phrases"]})
    for start, end in text["phrases"]:
        yield start, end, draw.sample([other for other in ends if other != end], 3)


def agreement(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Yield nouns in singular or plural, to be followed by the matching verb."""
    nouns, verbs = text["nouns"], text["verbs"]
    cases = [(start, noun, verb) for start in text["articles"] for noun in nouns for verb in verbs]
    for number, (start, (one, several), (singular, plural)) in enumerate(draw.sample(cases, 60)):
        alone = number // 2 % 2 == 0
        right, wrong = (singular, plural) if alone else (plural, singular)
        yield f"{start} {one if alone else several}", f" {right}", [f" {wrong}"]


def brackets(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Yield texts with two open brackets, to be closed in the right order."""
    functions = ["len", "print", "max", "list", "sum", "str", "int", "sorted"]
    things = ["items", "values", "names", "args", "data", "rows", "keys", "lines"]
    for _ in range(60):
        outer, inner = draw.choice([("(", "["), ("(", "("), ("[", "("), ("[", "[")])
        inside = draw.choice(["i", "0", "1", "name", "key", "n"])
        opened = f"{draw.choice(functions)}(" if outer == "(" else f"{draw.choice(things)}["
        opened += f"{draw.choice(things)}[" if inner == "[" else f"{draw.choice(functions)}("
        right = _CLOSING[inner] + _CLOSING[outer]
        start = f"    {draw.choice(['x', 'n', 'result', 'count', 'value'])} = {opened}{inside}"
        wrong = [pair for pair in (")]", "])", "))", "]]") if pair != right]
        yield start, right + "\n", [pair + "\n" for pair in wrong]


def arithmetic(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Yield linear equations as in schoolbooks."""
    for _ in range(60):
        factor, solution, added = draw.randint(2, 9), draw.randint(2, 9), draw.randint(1, 30)
        unknown = draw.choice("xyzkmt")
        question = f"Solve {factor}{unknown} + {added} = {factor * solution + added} for {unknown}.\n"
        wrong = [solution + 1, -solution, solution + 10]
        yield question, f"{solution}\n", [f"{number}\n" for number in wrong]


SUBJECTS: dict[str, Callable[[dict[str, Any], random.Random], Iterator[Item]]] = {
    "languages": languages,
    "registers": registers,
    "phrases": phrases,
    "agreement": agreement,
    "brackets": brackets,
    "arithmetic": arithmetic,
}

if __name__ == "__main__":
    ITEMS.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items()), "utf-8")
