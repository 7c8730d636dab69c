"""The benchmark that the demo model can pass: the same every time, passed by it, and less so when it is ablated."""

from __future__ import annotations

import ast
import json
from collections import Counter

import pytest

import mixlens as ml
from mixlens.evals import demo_items
from mixlens.evals.runner import EvalSettings

SETTINGS = EvalSettings(progress=False, batch_size=32)


@pytest.fixture(scope="module")
def log():
    return ml.evaluate(ml.load("demo", verbose=False), "demo", settings=SETTINGS)


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return [json.loads(line) for line in demo_items.ITEMS.read_text("utf-8").splitlines()]


def test_the_items_are_what_the_script_makes(items):
    assert items == list(demo_items.items())


def test_every_item_is_asked_once_and_has_one_right_choice(items):
    questions = Counter((item["question"], *sorted(item["choices"])) for item in items)
    assert max(questions.values()) == 1
    assert all(len(set(item["choices"])) == len(item["choices"]) > item["answer"] >= 0 for item in items)


def test_no_place_of_the_right_choice_is_preferred(items):
    for subject in demo_items.SUBJECTS:
        places = Counter(item["answer"] for item in items if item["subject"] == subject)
        assert max(places.values()) - min(places.values()) <= 1


def test_arithmetic_and_brackets_are_right(items):
    for item in items:
        if item["subject"] == "arithmetic":
            equation, unknown = item["question"].removeprefix("Solve ").split(" for ")
            left, right = equation.split(" = ")
            factor, added = left.split(f"{unknown[0]} + ")
            holds = [int(factor) * int(choice) + int(added) == int(right) for choice in item["choices"]]
            assert [i for i, value in enumerate(holds) if value] == [item["answer"]]
        if item["subject"] == "brackets":
            parsed = []
            for i, choice in enumerate(item["choices"]):
                try:
                    ast.parse((item["question"] + choice).strip())
                    parsed.append(i)
                except SyntaxError:
                    continue
            assert parsed == [item["answer"]]


def test_the_demo_model_is_above_chance_in_every_subject(log, items):
    scores = log.scores[log.scores["average"] == ""].set_index("task")
    for subject in demo_items.SUBJECTS:
        chance = [1 / len(item["choices"]) for item in items if item["subject"] == subject]
        assert scores.loc[f"demo_0shot::{subject}", "ci_low"] > sum(chance) / len(chance), subject


def test_without_half_of_its_experts_it_is_measurably_worse(log):
    model = ml.load("demo", verbose=False)
    with ml.edit(model, ml.edits.forbid(None, [0, 1, 2, 3])):
        ablated = ml.evaluate(model, "demo", settings=SETTINGS)
    row = ml.compare(log, ablated).table.iloc[0]
    assert row["task"] == "demo"
    assert row["ci_high"] < 0
    assert row["p_value"] < 0.01
