"""The most frequent of several sampled answers: the vote itself, and whole runs that sample, stop and go on."""

from __future__ import annotations

import pytest
from evals_parts import PROBLEMS, write_math

import mixlens as ml
from mixlens.evals import runner
from mixlens.evals.lm_eval_grading import Job, grade, load_tasks
from mixlens.evals.math_scorer import result_of
from mixlens.evals.runner import EvalSettings


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


@pytest.fixture
def folders(shared, tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.setattr(runner, "verified_sums", lambda *_: {})  # MATH has problems of the project's own
    return {"gsm8k": str(shared / "data"), "math": str(write_math(tmp_path / "problems"))}


def scores_of(task: str, root: str, answers: list[list[str]]) -> list[dict[str, float]]:
    """Metrics of the first documents, by what was answered to each."""
    job = Job((task,), root=root, limit=len(answers))
    loaded = load_tasks(job)
    (name,) = loaded.tasks
    given = {(name, doc, 0, n): text for doc, texts in enumerate(answers) for n, text in enumerate(texts)}
    return [sample["metrics"] for sample in grade(job, loaded, given)["samples"]]


def test_gsm8k_counts_the_number_that_most_answers_end_with(folders):
    job = Job(("gsm8k_8shot_maj8",), root=folders["gsm8k"], limit=5)
    docs = [dict(doc) for doc in load_tasks(job).tasks["gsm8k_8shot_maj8"].eval_docs][:5]
    right = [doc["answer"].split("#### ")[1] for doc in docs]
    good, bad = [f"So it is.\n#### {number}" for number in right], "I am sure.\n#### 123456789"
    silent = "It cannot be known."
    answers = [
        [good[0]] * 3 + [bad] * 2 + [silent] * 3,  # the silent ones do not vote
        [bad] * 3 + [good[1]] * 2 + ["#### 987"] * 2 + [silent],  # three are most
        [good[2], bad] * 4,  # of equals the first
        [bad, good[3]] * 4,
        [silent] * 8,  # nobody has an answer: wrong, not unscored
    ]
    assert [metrics["exact_match"] for metrics in scores_of("gsm8k_8shot_maj8", folders["gsm8k"], answers)] == [
        1.0, 0.0, 1.0, 0.0, 0.0,
    ]  # fmt: skip


def test_math_counts_results_whatever_form_they_come_in(folders):
    boxed = [solution for _, solution in PROBLEMS]
    said = [f"Final Answer: The final answer is ${result_of(text)}$. I hope it is correct." for text in boxed]
    bad, silent = "So we have $\\boxed{17}$.", "It is large."
    answers = [
        [bad, boxed[0], said[0], bad.replace("17", "18")],  # two forms of one result are two votes
        [bad, bad, said[1], boxed[1]],  # of equals the first
        [boxed[2], said[2], bad, bad],
        [silent, silent, silent, boxed[3]],
        [silent] * 4,
    ]
    found = scores_of("math_4shot_maj4::algebra", folders["math"], answers)
    assert [metrics["math_equal"] for metrics in found] == [1.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.slow
def test_a_sampled_run_is_that_of_its_seed_and_goes_on_where_it_stopped(demo, folders, tmp_path):
    task, n = "math_4shot_maj4::algebra", 4

    def run(out: str, limit: int = 2, **settings) -> ml.evals.Log:
        chosen = EvalSettings(**{"progress": False, "batch_size": n, **settings})
        return ml.evaluate(demo, task, data=folders["math"], limit=limit, out=tmp_path / out, settings=chosen)

    def stop(done: int, total: int) -> None:
        assert total == 2 * n
        if done:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run("stopped", progress=stop)
    whole, resumed, other = run("whole"), run("stopped"), run("other", limit=1, seed=1)
    assert resumed.records == whole.records
    assert [len(record["responses"]) for record in whole.records] == [n, n]
    assert all(len(set(record["responses"])) > n // 2 for record in whole.records)
    assert not set(whole.records[0]["responses"]) & set(other.records[0]["responses"])
    assert all(record["correct"] in (0.0, 1.0) for record in whole.records)
