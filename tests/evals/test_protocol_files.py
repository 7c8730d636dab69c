"""What each protocol is: a table written from the papers, held against the task files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mixlens.evals import data

FILES = Path(__file__).parents[2] / "evals"
STOPS_OF_CODE = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@"]  # Chen et al. 2021, and of their harness
ENDS = ["Question:", "</s>", "<|im_end|>"]

# Choices are scored by log-probability: (primary metric, all metrics, shots, split).
# acc_norm, by length of the choice, is the convention for ARC and HellaSwag; MMLU's choices are letters of one length.
NORMED, LETTERS = ("acc_norm", {"acc", "acc_norm"}), ("acc", {"acc"})
CHOICES = {
    "arc_challenge_0shot": (*NORMED, 0, "test"),
    "arc_challenge_25shot": (*NORMED, 25, "test"),
    "arc_easy_0shot": (*NORMED, 0, "test"),
    "hellaswag_0shot": (*NORMED, 0, "validation"),  # HellaSwag's test split has no answers
    "hellaswag_10shot": (*NORMED, 10, "validation"),
    "mmlu_5shot": (*LETTERS, 5, "test"),
    "demo_0shot": (*LETTERS, 0, "test"),
    **{f"arc_challenge_{language}_0shot": (*NORMED, 0, "test") for language in ("de", "es", "fr", "it")},
    **{f"hellaswag_{language}_0shot": (*NORMED, 0, "val") for language in ("de", "es", "fr", "it")},
    **{f"mmlu_{language}_5shot": (*LETTERS, 5, "test") for language in ("de", "es", "fr", "it")},
}
# Answers are generated: (primary metric, shots, longest answer in tokens, sampled answers or 1 greedy one, stops).
GENERATED = {
    "humaneval_0shot": ("passed", 0, 1024, 1, STOPS_OF_CODE),
    "humaneval_0shot_instruct": ("passed", 0, 1024, 1, []),
    "mbpp_3shot": ("passed", 3, 512, 1, ["[DONE]"]),
    "mbpp_3shot_sanitized": ("passed", 3, 512, 1, ["[DONE]"]),
    "gsm8k_5shot": ("exact_match,final-answer", 5, 512, 1, ENDS),
    "gsm8k_8shot_maj8": ("exact_match", 8, 512, 8, ENDS),
    "math_4shot": ("math_equal", 4, 1024, 1, ["Problem:"]),
    "math_4shot_maj4": ("math_equal", 4, 1024, 4, ["Problem:"]),
    "mmlu_5shot_generative": ("exact_match", 5, 8, 1, ["\n"]),
}


class _Loader(yaml.SafeLoader):
    """YAML whose functions stay names."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


def task_file(name: str) -> dict[str, Any]:
    """A task file on top of the one that it includes."""
    own = yaml.load((FILES / f"{name}.yaml").read_text("utf-8"), _Loader)
    return (task_file(own.pop("include").removesuffix(".yaml")) if "include" in own else {}) | own


def test_every_protocol_has_its_row():
    assert {path.stem for path in FILES.glob("*.yaml")} == CHOICES.keys() | GENERATED.keys()


@pytest.mark.parametrize("name", CHOICES)
def test_a_protocol_of_choices(name):
    primary, metrics, shots, split = CHOICES[name]
    task = task_file(name)
    assert task["metadata"]["primary"] == primary
    assert {one["metric"] for one in task["metric_list"]} == metrics
    assert all(one["aggregation"] == "mean" and one["higher_is_better"] for one in task["metric_list"])
    assert task["output_type"] == "multiple_choice"
    assert task["num_fewshot"] == shots
    assert (task.get("test_split"), task.get("validation_split")) == (
        ("test", None) if split == "test" else (None, split)
    )
    assert "generation_kwargs" not in task
    if shots:
        assert task["fewshot_split"] not in (None, split)
        drawn = name in ("arc_challenge_25shot", "hellaswag_10shot")  # by the seed, as the Open LLM Leaderboard's
        assert task.get("fewshot_config", {}).get("sampler", "default") == ("default" if drawn else "first_n")


@pytest.mark.parametrize("name", GENERATED)
def test_a_protocol_of_answers(name):
    primary, shots, longest, answers, stops = GENERATED[name]
    task = task_file(name)
    assert task["metadata"]["primary"] == primary
    assert task["num_fewshot"] == shots
    assert task["test_split"] == "test"
    asked = task["generation_kwargs"]
    assert (asked["max_gen_toks"], asked["until"]) == (longest, stops)
    assert asked["do_sample"] == (answers > 1)
    assert task.get("repeats", 1) == answers
    assert (asked.get("temperature", 0.0) > 0) == (answers > 1)
    if shots:
        assert task["fewshot_config"]["sampler"] == "first_n"
        assert task.get("fewshot_split") != "test"


@pytest.mark.parametrize("name", [*CHOICES, *GENERATED])
def test_a_protocol_says_whose_it_is(name):
    about = task_file(name)["metadata"]
    shots = {**CHOICES, **GENERATED}[name]
    assert name.startswith(about["benchmark"])
    assert f"{(shots[2] if name in CHOICES else shots[1])}-shot" in about["title"] or name == "demo_0shot"


def test_a_number_is_read_strictly_first_and_a_majority_by_one_vote():
    _, strict, flexible = task_file("gsm8k_5shot")["filter_list"]
    assert (strict["name"], flexible["name"]) == ("strict-match", "flexible-extract")
    assert "####" in strict["filter"][0]["regex_pattern"]
    assert "####" not in flexible["filter"][0]["regex_pattern"]
    assert flexible["filter"][0]["group_select"] == -1  # the last number, not the first
    for name in ("gsm8k_8shot_maj8", "math_4shot_maj4"):
        assert [one["name"] for one in task_file(name)["filter_list"]] == ["majority"]


def test_code_is_unsafe_and_no_other_task_is():
    assert {name for name in (*CHOICES, *GENERATED) if task_file(name).get("unsafe_code")} == {
        name for name in GENERATED if name.startswith(("humaneval", "mbpp"))
    }


@pytest.mark.parametrize(("subset", "shots", "asked"), [("full", 9, 500), ("sanitized", 7, 257)])
def test_mbpp_has_its_two_subsets(shared, subset, shots, asked):
    """974 problems, of which 11 to 510 are asked; of the 427 verified by hand 257 lie there (Austin et al. 2021)."""
    splits = data.mbpp(subset, str(shared / "data"))
    assert (len(splits["prompt"]), len(splits["test"])) == (shots, asked)
