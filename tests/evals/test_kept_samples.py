"""What is kept of every sample, for each kind of request: read back beside what a model object was told to say."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
from helpers.evaluations import Job, Told, task_file
from hub_data import write_folder

import mixlens as ml
from mixlens.evals import runner

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


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_the_form_of_an_answer_and_how_its_program_ended_are_kept_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "verified_sums", lambda *_: {})
    write_folder(tmp_path)

    def say(prompt: str, _: int) -> str:
        if prompt.startswith("Question"):
            return " I count them.\n\\boxed{1,200\\text{ eggs}}"
        return "    return object()\n"

    tasks = ["gsm8k_5shot", "humaneval_0shot"]
    settings = ml.evals.EvalSettings(progress=False)
    log = ml.evaluate(Told(says=say), tasks, data=tmp_path, limit=1, settings=settings)
    number, program = (record["readings"] for record in log.records)
    assert number == [{"form": "box", "found": "1200"}]
    assert program == [{"form": "continues the prompt", "outcome": "not plain"}]
    assert any("1 of 1 programs" in remark for remark in log.remarks())
    assert any("box (1)" in remark for remark in log.remarks())
