"""evaluate end to end on the demo model: the same as stock lm-eval, resumable, and refusing what it cannot do."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import mixlens as ml
from mixlens.evals.runner import EvalSettings

SUBJECTS = ("anatomy", "virology")
TASKS = [f"mmlu_5shot::{subject}" for subject in SUBJECTS]
QUIET = EvalSettings(progress=False)
LIMIT = 12


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


@pytest.fixture
def data(shared) -> Path:
    if not (shared / "data" / "mmlu").exists():
        pytest.skip("the benchmark data (shared/data) is not here")
    return shared / "data"


def stock(model, data: Path) -> dict:
    """MMLU by lm-eval's own task files and its own HFLM; only the rows come from the folder instead of the Hub."""
    import lm_eval.tasks
    from datasets import Dataset

    def rows(subject: str, split: str) -> Dataset:
        with (data / "mmlu" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
            return Dataset.from_list(
                [{"question": q, "choices": c, "answer": "ABCD".index(a)} for q, *c, a in csv.reader(file)]
            )

    manager = TaskManager(include_path=[], include_defaults=False)
    tasks = []
    for subject in SUBJECTS:
        path = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default" / f"mmlu_{subject}.yaml"
        config = lm_eval.tasks.manager.load_yaml(path)
        config["custom_dataset"] = lambda subject=subject, **_: {s: rows(subject, s) for s in ("dev", "test")}
        config.pop("tag")
        tasks += list(manager.load([config])["tasks"].values())
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=True)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, num_fewshot=5, limit=LIMIT)


def test_mmlu_of_two_subjects_is_that_of_stock_lm_eval(demo, data, tmp_path):
    log = ml.evaluate(demo, TASKS, out=tmp_path / "run", data=data, limit=LIMIT, settings=QUIET)
    expected = stock(demo, data)
    for subject in SUBJECTS:
        theirs = expected["samples"][f"mmlu_{subject}"]
        ours = log.samples[log.samples["task"] == f"mmlu_5shot::{subject}"]
        assert [s["arguments"][0][0] for s in theirs] == ours["prompt"].tolist()
        logprobs = np.array([[r[0][0] for r in sample["resps"]] for sample in theirs])
        assert np.allclose(logprobs, np.array(ours["logprobs"].tolist()), atol=1e-4)
        assert [s["acc"] for s in theirs] == ours["acc"].tolist()
        score = log.scores.set_index("task").loc[f"mmlu_5shot::{subject}", "score"]
        assert score == pytest.approx(expected["results"][f"mmlu_{subject}"]["acc,none"])


def test_a_run_opens_as_what_evaluate_gave(demo, data, tmp_path):
    log = ml.evaluate(demo, TASKS, out=tmp_path / "run", data=data, limit=3, settings=QUIET)
    opened = ml.open(tmp_path / "run")
    assert isinstance(opened, ml.evals.Log)
    assert opened.records == log.records
    assert opened.meta["tasks"] == log.meta["tasks"]
    assert opened.scores.equals(log.scores)
    again = ml.evaluate(demo, TASKS, out=tmp_path / "run", data=data, limit=3, settings=QUIET)
    assert again.records == log.records


def test_micro_and_macro_are_the_two_means(demo, data):
    log = ml.evaluate(demo, TASKS, data=data, limit=5, settings=QUIET)
    by = log.scores.set_index("average")["score"]
    assert by["micro"] == pytest.approx(log.samples["acc"].mean())
    assert by["macro"] == pytest.approx(log.samples.groupby("task")["acc"].mean().mean())
