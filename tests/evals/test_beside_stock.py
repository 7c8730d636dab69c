"""The same name gives the prompts and shots of stock lm-eval, or a remark says what differs."""

from __future__ import annotations

import pytest
from helpers.evaluations import Told, task_file
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import mixlens as ml
from mixlens.cli.main import main
from mixlens.evals.protocols import Protocol, tasks_folder
from mixlens.evals.stock import stock_remarks

ROWS = [{"q": f"What is {i}?", "a": f"word {i}"} for i in range(12)]


@pytest.fixture
def task(tmp_path) -> str:
    rows = tmp_path / "shots.jsonl"
    rows.write_text("".join(f'{{"q": "And {i}?", "a": "shot {i}"}}\n' for i in range(40)))
    files = {"test": str(tmp_path / "drawn.jsonl"), "train": str(rows)}
    return task_file(
        tmp_path, "drawn", ROWS, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
        dataset_kwargs={"data_files": files}, training_split="train", fewshot_split="train", num_fewshot=3,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


def prompts(task: str, **settings) -> tuple[list[str], ml.evals.Log]:
    settings = ml.evals.EvalSettings(progress=False, **settings)
    log = ml.evaluate(Told(says=lambda *_: "word"), task, limit=5, settings=settings)
    return [record["prompt"] for record in log.records], log


def test_shots_are_those_of_stock_lm_eval_unless_another_seed_is_asked_for(task):
    stock = simple_evaluate(
        model=Told(says=lambda *_: "word"), tasks=[task], limit=5, log_samples=True, task_manager=TaskManager()
    )
    assert stock is not None
    theirs = [sample["arguments"][0][0] for sample in stock["samples"]["drawn"]]
    ours, log = prompts(task)
    assert ours == theirs
    assert not log.meta["beside_lm_eval"]
    assert prompts(task, seed=7)[0] == theirs  # of sampled answers alone
    others, log = prompts(task, shots_seed=0)
    assert others != theirs
    assert any("1234" in remark and "drawn" in remark for remark in log.remarks())


@pytest.mark.parametrize(
    ("name", "protocol", "key"),
    [
        ("gsm8k", "gsm8k_5shot", "fewshot_config"), ("hellaswag", "hellaswag_10shot", "num_fewshot"),
        ("humaneval", "humaneval_0shot_instruct", "doc_to_text"), ("mmlu", "mmlu_5shot", "description"),
        ("arc_easy", "arc_easy_0shot", ""), ("hellaswag", "hellaswag_0shot", ""), ("gsm8k_5shot", "gsm8k_5shot", ""),
    ],
)  # fmt: skip
def test_a_name_that_lm_eval_knows_otherwise_is_told_with_what_differs(name, protocol, key):
    chosen = Protocol(protocol, tasks_folder() / f"{protocol}.yaml")
    remarks = stock_remarks([name], {"t": None}, {"t": chosen}, 1234)
    assert [key in remark and protocol in remark for remark in remarks] == [True] * bool(key)


def test_the_first_prompt_is_shown_whole_before_anything_is_asked(task, capsys):
    shown: list[str] = []

    def say(*_) -> str:
        shown.append(capsys.readouterr().err)
        return "word"

    settings = ml.evals.EvalSettings(progress=False, verify_prompts=True)
    log = ml.evaluate(Told(says=say), task, limit=2, settings=settings)
    assert log.records[0]["prompt"] in shown[0]
    assert log.records[1]["prompt"] not in "".join(shown)


def test_the_command_shows_it_on_stderr_and_its_result_alone_on_stdout(task, capsys, tmp_path):
    arguments = ["eval", "demo", task, "--limit", "1", "--verify-prompts", "--json", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    (record,) = ml.open(tmp_path / "out").records
    assert record["prompt"] in printed.err
    assert record["prompt"] not in printed.out
