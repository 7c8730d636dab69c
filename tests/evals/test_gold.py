"""A model that is always right scores 1: gold answers enter as generated token ids, with Mixtral's own tokenizer."""

from __future__ import annotations

import threading

import pytest
from evals_parts import PROBLEMS, mixtral_tokenizer, small_mixtral, write_math

from mixlens.evals import math_scorer as mathematics
from mixlens.evals.backends import LocalBackend
from mixlens.evals.lm_eval_grading import Job, grade, key_of, load_tasks
from mixlens.evals.model import repeats_of
from mixlens.evals.preflight import gold_of
from mixlens.evals.runner import EvalSettings


@pytest.fixture(scope="module")
def backend() -> LocalBackend:
    return LocalBackend(small_mixtral(), EvalSettings(tokenizer=mixtral_tokenizer(), progress=False))


def always_right(backend: LocalBackend, task: str, root: str, limit: int | None = None) -> list[dict]:
    """Samples of a model whose generated tokens are those of the gold answers."""
    job = Job((task,), root=root, limit=limit)
    loaded = load_tasks(job)
    requests = loaded.build(job, backend.chat_template)
    answers = {
        key_of(request, repeat): gold_of(backend, loaded.tasks[request.task_name], request.request_type, request)
        for request, repeat in zip(requests, repeats_of(requests), strict=True)
    }
    return grade(job, loaded, answers, backend.chat_template)["samples"]


@pytest.mark.slow
def test_all_canonical_solutions_of_humaneval_pass(backend, shared):
    samples = always_right(backend, "humaneval_0shot", str(shared / "data"))
    assert len(samples) == 164
    assert [s["sample_id"] for s in samples if s["metrics"]["passed"] != 1] == []


def test_decoding_a_continuation_alone_would_lose_its_first_space(backend):
    lm = backend.lm
    gold = "    return sorted(numbers)\n"
    ids = lm.tok_encode("def f(numbers):\n" + gold)[len(lm.tok_encode("def f(numbers):\n")) :]
    assert lm.decode(ids) == gold
    assert lm.tokenizer.decode(ids) != gold


@pytest.mark.slow
def test_all_worked_answers_of_gsm8k_are_graded_right(backend, shared):
    samples = always_right(backend, "gsm8k_5shot", str(shared / "data"))
    assert len(samples) == 1319
    for metric in ("exact_match,final-answer", "exact_match,strict-match", "exact_match,flexible-extract"):
        assert [s["sample_id"] for s in samples if s["metrics"][metric] != 1] == []


def test_gold_answers_of_math_are_graded_right_in_both_forms(backend, tmp_path):
    root = str(write_math(tmp_path))
    samples = always_right(backend, "math_4shot::algebra", root)
    assert [s["metrics"]["math_equal"] for s in samples] == [1.0] * len(PROBLEMS)
    assert [s["metrics"]["math_verify"] for s in samples] == [1.0] * len(PROBLEMS)
    assert sum(s["metrics"]["exact_match"] for s in samples) == 0  # lm-eval's grader knows the other form alone
    for problem, solution in PROBLEMS:
        result = mathematics.result_of(solution)
        final = f"We see it.\nFinal Answer: The final answer is ${result}$. I hope it is correct."
        assert mathematics.grade({"problem": problem, "solution": solution}, [final])["math_equal"] == 1


def test_wrong_answers_of_math_are_graded_wrong():
    for _, solution in PROBLEMS:
        assert not mathematics.equal("17", mathematics.result_of(solution))
        assert not mathematics.equal("", mathematics.result_of(solution))


def test_grading_off_the_main_thread_is_the_same(backend, tmp_path):
    root, found = str(write_math(tmp_path)), []
    thread = threading.Thread(target=lambda: found.extend(always_right(backend, "math_4shot::geometry", root, 3)))
    thread.start()
    thread.join()
    assert [s["metrics"]["math_equal"] for s in found] == [1.0] * 3


def test_a_majority_leaves_out_answers_without_a_number():
    answers = ["It is hard.", "#### 5", "I cannot say.", "so #### 1,200", "who knows", "#### 1200."]
    assert mathematics.gsm8k_majority([answers, ["none", "at all"]], [{}, {}]) == ["1200", ""]
    worked = ["\\boxed{3}", "nothing", "\\boxed{\\frac{1}{2}}", "nothing", "the final answer is $\\frac12$."]
    assert mathematics.math_majority([worked], [{}]) == ["\\boxed{\\frac{1}{2}}"]


def test_prompts_have_one_bos_with_and_without_a_chat_template(backend):
    lm = backend.lm
    bos = lm.tokenizer.bos_token_id
    for text in ("Question: why?", "<s> [INST] Why? [/INST]"):
        ids = lm.tok_encode(text)
        assert ids.count(bos) == 1
        assert ids[0] == bos
    assert bos not in lm.tok_encode("Question", add_special_tokens=False)
