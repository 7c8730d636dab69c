"""Benchmarks of the Hub, without one: the translated ones load, and what cannot be is said before anything is asked."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.refusals import refused
from hub_data import LANGUAGES, publish
from scripted_hub import Hub

import mixlens as ml
from mixlens.cli.main import main
from mixlens.core.hub import fault_of
from mixlens.evals import data
from mixlens.evals.hub_datasets import HUB
from mixlens.evals.lm_eval_grading import Job, load_tasks


def test_translated_protocols_read_the_schema_of_their_data_sets(monkeypatch):
    hub = Hub("http://127.0.0.1:9")
    commits = publish(hub)

    def splits_of(benchmark: str, subset: str, revisions: dict[str, str]) -> dict[str, Dataset]:
        files = hub.repositories["datasets", HUB[benchmark]].commits[revisions[HUB[benchmark]]]
        found = {path: content for path, content in files.items() if path.startswith(f"data/{subset}/")}
        return {Path(p).stem: Dataset.from_list([*map(json.loads, c.splitlines())]) for p, c in found.items()}

    monkeypatch.setattr(data, "splits_of", splits_of)
    kinds = ("arc_challenge_{}_0shot", "hellaswag_{}_0shot", "mmlu_{}_5shot")
    names = tuple(kind.format(language) for kind in kinds for language in LANGUAGES)
    job = Job(names, limit=2, revisions=commits)
    requests = load_tasks(job).build(job)
    assert {request.task_name for request in requests} == set(names)
    for language in LANGUAGES:
        prompts = [r.args[0] for r in requests if f"_{language}_" in r.task_name and "arc" not in r.task_name]
        assert prompts
        assert all(f"({language})" in prompt for prompt in prompts)


def test_revisions_that_cannot_be_are_said(capsys):
    for revisions, said in {
        "main": ("revisions", "main"),
        ("openai/gsm8k",): ("revisions", ("openai/gsm8k",)),
    }.items():
        with refused(ml.BadInput, *said):
            ml.evaluate("demo", "gsm8k_5shot", settings=ml.evals.EvalSettings(revisions=revisions))  # type: ignore[arg-type]
    assert main(["eval", "demo", "demo_0shot", "--data-revision", "openai/gsm8k"]) == 2
    assert "--data-revision" in capsys.readouterr().err


def test_a_revision_of_a_data_set_that_no_task_reads_is_refused(tmp_path):
    settings = ml.evals.EvalSettings(revisions={"openai/gsm8k": "main"}, progress=False)
    with refused(ml.BadInput, "revisions", ["openai/gsm8k"]):
        ml.evaluate(ml.load("demo", verbose=False), "demo_0shot::phrases", settings=settings)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EACCES, "not writable"), (errno.ENOENT, None)],
)
def test_a_cache_that_cannot_be_written_is_told_from_a_hub_out_of_reach(number, said):
    error = ValueError("wrapped")
    error.__cause__ = OSError(number, "as the system says it")
    found = fault_of(error)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert said in found[0]
        assert "HF_HOME" in found[1]
