"""What is kept of every sample, for each kind of request: read back beside what a model object was told to say."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from helpers.evaluations import Job, Told, task_file

import mixlens as ml

WORDS = {" red": -3.0, " green": -1.0, " blue": -2.0}
COLOURS = list(WORDS)


@pytest.fixture
def evaluated(tmp_path):
    def evaluate(model: Told, rows, **fields) -> ml.evals.Log:
        task = task_file(tmp_path, "told", rows, **fields)
        return ml.evaluate(model, task, settings=ml.evals.EvalSettings(progress=False))

    return evaluate


@pytest.mark.parametrize(
    ("gold", "place"), [(1, 1), ("blue", 2), ("red", 0)], ids=["by number", "by name", "by the first name"]
)
def test_a_choice_keeps_its_gold_answer_and_all_log_probabilities(evaluated, gold, place):
    log = evaluated(
        Told(WORDS),
        [{"q": "Sky?", "gold": gold}],
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice=["red", "green", "blue"],
        doc_to_target="gold",
    )
    sample = log.samples.iloc[0]
    assert list(sample["choices"]) == COLOURS
    assert list(sample["logprobs"]) == [-3.0, -1.0, -2.0]
    assert (sample["response"], sample["gold"], sample["target"]) == (" green", place, COLOURS[place])
    assert sample["acc"] == float(place == 1)


def test_of_several_answers_the_first_is_the_response_and_all_are_kept(evaluated):
    log = evaluated(
        Told(says=lambda prompt, before: f"{prompt} answer {before}"),
        [{"q": "one", "a": "x"}, {"q": "two", "a": "y"}],
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="a",
        repeats=3,
        generation_kwargs={"until": ["\n"], "do_sample": True, "temperature": 1.0},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[{"name": "all", "filter": [{"function": "take_first_k", "k": 3}]}],
    )
    for word, sample in zip(("one", "two"), log.samples.to_dict("records"), strict=True):
        assert sample["response"] == f"{word} answer 0"
        assert list(sample["responses"]) == [f"{word} answer {i}" for i in range(3)]
        assert sample["prompt"] == word


def test_a_job_comes_back_from_json():
    job = Job(("mmlu_5shot", "x"), "p", "root", 3, 9, "tok", {"data/set": "abc"})
    assert Job.of(json.loads(json.dumps(asdict(job)))) == job
