"""A killed evaluation goes on where it stopped; what cannot be scored is refused before the model is asked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evals_parts import mixtral_tokenizer, small_mixtral, write_math
from helpers.refusals import refused
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import mixlens as ml
from mixlens.evals import runner
from mixlens.evals.backends import backend_of
from mixlens.evals.generating import SeededNoise
from mixlens.evals.model import LocalLM, tokenizer_of
from mixlens.evals.response_cache import PARTIAL
from mixlens.evals.runner import EvalSettings

TASKS = ["demo_0shot::brackets", "demo_0shot::phrases"]
QUIET = EvalSettings(progress=False, batch_size=4)
# Evaluates until it has answered three batches, then kills itself without a chance to clean up.
KILLED = """
import os, signal, sys
import mixlens as ml
from mixlens.evals import response_cache as answers
from mixlens.evals.runner import EvalSettings
add, count = answers.Answers.add, [0]
def add_and_die(self, *given):
    add(self, *given)
    count[0] += 1
    if count[0] == 3:
        with self.path.open("a") as file:
            file.write('{"batch": "loglikelihood:3", "answers": [["demo')
        os.kill(os.getpid(), signal.SIGKILL)
answers.Answers.add = add_and_die
ml.evaluate(ml.load("demo", verbose=False), %r, out=sys.argv[1], settings=EvalSettings(progress=False, batch_size=4))
"""


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_samples(demo, tmp_path, monkeypatch):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED % TASKS, str(tmp_path / "killed")], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "killed" / PARTIAL).read_bytes().splitlines()) == 4
    with refused(ml.RunError, "shards", 0):
        ml.open(tmp_path / "killed")

    asked: list[str] = []
    answer = LocalLM.answer
    monkeypatch.setattr(LocalLM, "answer", lambda self, kind, *rest: asked.append(kind) or answer(self, kind, *rest))
    resumed = ml.evaluate(demo, TASKS, out=tmp_path / "killed", settings=QUIET)
    n_resumed = len(asked)
    whole = ml.evaluate(demo, TASKS, out=tmp_path / "whole", settings=QUIET)
    assert len(asked) - n_resumed == n_resumed + 3
    assert resumed.records == whole.records
    assert resumed.scores.equals(whole.scores)
    results = [(tmp_path / run / "results.jsonl").read_bytes() for run in ("killed", "whole")]
    assert results[0] == results[1]
    assert not (tmp_path / "killed" / PARTIAL).exists()
    assert json.loads((tmp_path / "whole" / "lm_eval_results.json").read_text())["results"][TASKS[0]]["acc,none"] >= 0


def test_another_model_is_never_given_the_answers_of_the_first(demo, tmp_path):
    ml.evaluate(demo, TASKS[:1], out=tmp_path / "run", limit=2, settings=QUIET)
    with ml.edit(demo, ml.edits.top_k(1)), refused(ml.RunError, "out", ["model"]):
        ml.evaluate(demo, TASKS[:1], out=tmp_path / "run", limit=2, settings=QUIET)


def test_another_tokenizer_is_never_given_the_answers_of_the_first(demo, tmp_path):
    ml.evaluate(demo, TASKS[:1], out=tmp_path / "run", limit=2, settings=QUIET)
    tokenizer = tokenizer_of(demo)
    tokenizer.add_tokens(["<another>"])
    settings = EvalSettings(progress=False, batch_size=4, tokenizer=tokenizer)
    with refused(ml.RunError, "out", ["model"]):
        ml.evaluate(demo, TASKS[:1], out=tmp_path / "run", limit=2, settings=settings)


def test_choices_are_scored_alike_with_and_without_shared_shots(demo, shared):
    options = {"data": shared / "data", "limit": 6}
    tasks = ["mmlu_5shot::virology"]
    shared_shots = ml.evaluate(demo, tasks, **options, settings=QUIET)
    apart = ml.evaluate(demo, tasks, **options, settings=EvalSettings(progress=False, share_prefix=False))
    for ours, theirs in zip(shared_shots.records, apart.records, strict=True):
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)


def test_generated_answers_do_not_depend_on_the_batch(demo, shared):
    def answers(batch_size: int, **more) -> list[list[str]]:
        settings = EvalSettings(progress=False, batch_size=batch_size, **more)
        log = ml.evaluate(demo, "mmlu_5shot_generative::virology", data=shared / "data", limit=3, settings=settings)
        return [record["responses"] for record in log.records]

    assert answers(1) == answers(3)


def test_sampled_tokens_follow_the_softmax_whatever_rows_share_a_batch():
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    together = SeededNoise(range(4000))(None, logits.expand(4000, 3)).argmax(-1)
    alone = [int(SeededNoise([seed])(None, logits).argmax()) for seed in range(20)]
    assert together[:20].tolist() == alone
    shares = torch.bincount(together, minlength=3) / 4000
    assert torch.allclose(shares, logits.softmax(-1)[0], atol=0.03)


def test_a_prompt_that_does_not_fit_is_refused(demo, shared):
    settings = EvalSettings(progress=False, max_length=100)
    named = ("tasks", ("mmlu_5shot::virology", 1, 485, 100))
    with refused(ml.BadInput, *named):
        ml.evaluate(demo, "mmlu_5shot::virology", data=shared / "data", limit=2, settings=settings)


class Elsewhere(TemplateLM):
    """A model object of lm-eval's that encodes by itself, and is asked nothing here."""

    max_length, max_gen_toks, eot_token_id = 40, 16, 2
    tokenizer_name = ""

    def __init__(self, tokenizer, bos: bool) -> None:
        super().__init__()
        self.tokenizer, self.bos = tokenizer, bos

    def tok_encode(self, string, add_special_tokens=None, **_):
        return [self.tokenizer.bos_token_id] * self.bos + self.tokenizer.encode(string, add_special_tokens=False)

    def not_asked(self, *_, **__):
        raise AssertionError("the model was asked")

    _loglikelihood_tokens = loglikelihood_rolling = generate_until = not_asked


@pytest.mark.parametrize(
    ("bos", "task", "named"),
    [
        (False, "phrases", ("tokenizer", [1077, 598])),
        (True, "brackets", ("tasks", ("demo_0shot::brackets", 0, 11, 10))),
    ],
)
def test_a_model_object_of_lm_evals_passes_the_same_preflight(demo, bos, task, named):
    lm = Elsewhere(tokenizer_of(demo), bos)
    lm.max_length = 10
    with refused(ml.BadInput, *named):
        ml.evaluate(lm, f"demo_0shot::{task}", limit=4, settings=QUIET)


def test_a_model_object_of_lm_evals_is_told_from_another(demo):
    lm = Elsewhere(tokenizer_of(demo), True)
    lm.model_args = {"model": "mistralai/Mixtral-8x7B-v0.1", "revision": "main", "dtype": "float16"}
    told = backend_of(lm, QUIET).identity()
    assert (told["name"], told["revision"], told["dtype"]) == ("mistralai/Mixtral-8x7B-v0.1", "main", "float16")


def test_a_transformers_model_in_lm_evals_clothes_is_refused(demo):
    with refused(ml.BadInput, "model", "HFLM"):
        ml.evaluate(HFLM(pretrained=demo, tokenizer=tokenizer_of(demo)), TASKS, settings=QUIET)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "verified_sums", lambda *_: {})  # problems of our own
    tokenizer = mixtral_tokenizer()
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **kwargs: re.sub(" +", " ", decode(ids, **kwargs)).replace("{", "")
    root = write_math(tmp_path)
    settings = EvalSettings(progress=False, tokenizer=tokenizer)
    with refused(ml.BadInput, "tokenizer", ("math_4shot::algebra", 0)):
        ml.evaluate(small_mixtral(), "math_4shot::algebra", data=root, limit=1, settings=settings)


@pytest.mark.parametrize(
    ("tasks", "options", "named"),
    [
        ("mmlu_5shoot", {}, ("tasks", "mmlu_5shoot")),
        ("mmlu_5shot::anatom", {}, ("subject", "anatom")),
        ("mmlu", {"protocol": "mixtral-papers"}, ("protocol", "mixtral-papers")),
        ("humaneval", {}, ("protocol", "humaneval")),
        ("gsm8k", {"protocol": "humaneval_0shot"}, ("protocol", "gsm8k")),
        ("demo_0shot", {"data": "/not/there"}, ("data", "/not/there")),
        ("demo_0shot", {"limit": 0}, ("limit", 0)),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_what_to_give(demo, tasks, options, named):
    with refused(ml.BadInput, *named):
        ml.evaluate(demo, tasks, settings=QUIET, **options)


def test_code_is_never_run_outside_the_sandbox(demo, monkeypatch):
    task = SimpleNamespace(UNSAFE_CODE=True)  # what lm-eval makes of unsafe_code: true
    monkeypatch.setattr(TaskManager, "load", lambda self, files: {"tasks": {Path(file).stem: task for file in files}})
    with refused(ml.BadInput, "tasks", ["cruxeval_input"]):
        ml.evaluate(demo, "cruxeval_input", settings=QUIET)


def test_data_that_is_not_there_is_named(demo, tmp_path):
    with refused(ml.BadInput, "data"):
        ml.evaluate(demo, "mmlu_5shot::anatomy", data=tmp_path, settings=QUIET)


def test_wrong_data_is_refused(demo, tmp_path):
    with refused(
        ml.BadInput,
        "data",
        ["math/train/*/*.json: 42 files where there are 7500", "math/test/*/*.json: 42 files where there are 5000"],
    ):
        ml.evaluate(demo, "math_4shot::algebra", data=write_math(tmp_path), limit=1, settings=QUIET)


def test_wrong_data_is_found(shared, tmp_path):
    from mixlens.evals.verify import verify

    assert (verify(shared / "data")["fault"] == "").all()
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n')
    faults = verify(tmp_path).set_index("file")["fault"]
    assert faults["gsm8k/train.jsonl"] == "missing"
    assert faults["gsm8k/test.jsonl"].startswith("1 rows where there are 1,319")
    with refused(ml.BadInput, "data"):
        verify(Path(folder))


def test_progress_is_told_after_every_batch_and_may_end_an_evaluation(demo, tmp_path):
    told: list[tuple[int, int]] = []

    def stop_at_eight(done: int, total: int) -> None:
        told.append((done, total))
        if done >= 8:
            raise InterruptedError("stop was pressed")

    def settings(progress) -> EvalSettings:
        return EvalSettings(progress=progress, batch_size=4)

    options = {"out": tmp_path / "run", "limit": 4}
    with pytest.raises(InterruptedError):
        ml.evaluate(demo, TASKS[0], **options, settings=settings(stop_at_eight))
    n_stopped = len(told)
    resumed = ml.evaluate(demo, TASKS[0], **options, settings=settings(lambda *now: told.append(now)))
    assert told[0][0] == 0
    assert told[n_stopped] == told[n_stopped - 1]
    assert told[-1] == (16, 16)
    assert [done for done, _ in told[n_stopped:]] == sorted({done for done, _ in told[n_stopped:]})
    assert resumed.records == ml.evaluate(demo, TASKS[0], limit=4, settings=QUIET).records
