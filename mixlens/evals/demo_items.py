"""A benchmark for the demo model: small multiple-choice tasks, written for this project.

`python -m mixlens.evals.demo_items` regenerates demo_items.jsonl from demo_text.json, deterministically.
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
    """Return items of one subject: question, choices, answer (index of the right choice). Split test."""
    rows = [json.loads(line) for line in ITEMS.read_text("utf-8").splitlines()]
    return {"test": datasets.Dataset.from_list([row for row in rows if row["subject"] == subject])}


def items() -> Iterator[dict[str, Any]]:
    """Yield every item with shuffled choices; the position of the right one is uniform."""
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
    """Continue a sentence in its own language; the wrong choices say the same in four others."""
    for parallel in text["languages"]:
        for language, (start, end) in parallel.items():
            yield start, end, [other for name, (_, other) in parallel.items() if name != language]


def registers(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Continue a novel, an abstract, LaTeX, code or exercises in the same style."""
    by_register = text["registers"]
    for register, pairs in by_register.items():
        for start, end in pairs:
            yield start, end, [draw.choice(others)[1] for name, others in by_register.items() if name != register]


def phrases(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Complete a fixed expression; the wrong choices complete others."""
    ends = sorted({end for _, end in text["phrases"]})
    for start, end in text["phrases"]:
        yield start, end, draw.sample([other for other in ends if other != end], 3)


def agreement(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Choose the verb form that agrees with the noun."""
    nouns, verbs = text["nouns"], text["verbs"]
    cases = [(start, noun, verb) for start in text["articles"] for noun in nouns for verb in verbs]
    for number, (start, (one, several), (singular, plural)) in enumerate(draw.sample(cases, 60)):
        alone = number // 2 % 2 == 0
        right, wrong = (singular, plural) if alone else (plural, singular)
        yield f"{start} {one if alone else several}", f" {right}", [f" {wrong}"]


def brackets(text: dict[str, Any], draw: random.Random) -> Iterator[Item]:
    """Close two brackets in the right order."""
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
    """Solve a linear equation of a schoolbook."""
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
