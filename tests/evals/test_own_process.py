"""A model given by name is evaluated in a process of its own: the same answers, live progress, and a clean end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import Queue
from types import MappingProxyType, SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from evals_parts import PROBLEMS
from helpers.refusals import refused
from jupyter_client.manager import start_new_kernel

import mixlens as ml
from mixlens.evals import runner
from mixlens.evals import subprocess as own_process
from mixlens.evals.response_cache import PARTIAL, Answers
from mixlens.evals.runner import EvalSettings

TASKS = ["demo_0shot::brackets", "demo_0shot::phrases"]
# MATH's graders over the gold solutions, whatever the model answers: False for all off the main thread.
GOLD = """
from mixlens.evals import math_scorer as mathematics
def gold(document, results):
    return mathematics.grade(document, [document["solution"]])
"""
MATH = """
task: gold_of_math
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/problems.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{problem}}"
doc_to_target: "{{solution}}"
process_results: !function gold.gold
generation_kwargs: {max_gen_toks: 4, do_sample: false, until: ["."]}
metric_list:
  - {metric: math_equal, aggregation: mean, higher_is_better: true}
  - {metric: math_verify, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


@pytest.fixture
def math_task(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"problem": problem, "solution": solution} for problem, solution in PROBLEMS]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gold.py").write_text(GOLD)
    path = tmp_path / "math.yaml"
    path.write_text(MATH.replace("FOLDER", str(tmp_path)))
    return str(path)


def child() -> psutil.Process:
    """The process of the evaluation that this one is following."""
    return next(p for p in psutil.Process().children() if "mixlens.evals.worker" in p.cmdline())


def test_from_a_thread_it_is_the_same_as_in_place_and_maths_graders_work(demo, math_task):
    told, logs = [], []
    settings = EvalSettings(progress=lambda *now: told.append(now), batch_size=4)

    def work() -> None:
        logs.append(ml.evaluate("demo", [*TASKS, math_task], limit=6, settings=settings))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    here = ml.evaluate(demo, TASKS, limit=6, settings=EvalSettings(progress=False, batch_size=4))
    assert [record for record in logs[0].records if record["task"] in TASKS] == here.records
    graded = logs[0].samples.query("task == 'gold_of_math'")[["math_equal", "math_verify"]]
    assert graded.to_numpy().tolist() == [[1.0, 1.0]] * len(PROBLEMS)
    assert logs[0].path is None
    assert told[0] == (0, 54)
    assert told[-1] == (54, 54)
    assert len(told) > 6
    assert not [p for p in psutil.Process().children() if "mixlens.evals.worker" in p.cmdline()]


def test_what_ends_it_here_ends_it_there_and_the_answers_are_kept(demo, tmp_path):
    followed = []

    def stop(done: int, total: int) -> None:
        followed.append(child())
        if done >= 8:
            raise InterruptedError("stop was pressed")

    with pytest.raises(InterruptedError):
        ml.evaluate("demo", TASKS, out=tmp_path / "run", settings=EvalSettings(progress=stop, batch_size=4))
    assert not followed[0].is_running()
    kept = Answers(tmp_path / "run" / PARTIAL).by_key
    assert len(kept) >= 8
    quiet = EvalSettings(progress=False, batch_size=4)
    resumed = ml.evaluate(demo, TASKS, out=tmp_path / "run", settings=quiet)
    assert resumed.records == ml.evaluate(demo, TASKS, settings=quiet).records
    assert {(r["task"], r["sample_id"]) for r in resumed.records} >= {(task, doc) for task, doc, _, _ in kept}


KILLED = """
import os, sys
print("out of luck", file=sys.stderr, flush=True)
print('{"progress": [1, 9]}\\n{"progr', end="", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_process_that_is_killed_is_told_in_words(monkeypatch):
    told, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: popen([sys.executable, "-c", KILLED], **more))
    with refused(ml.RunError, "own_process", -9):
        ml.evaluate("demo", TASKS, settings=EvalSettings(progress=lambda *now: told.append(now)))
    assert told == [(1, 9)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"settings": EvalSettings(loading={"max_memory": 1})}, ("loading", ["max_memory"])),
        ({"settings": EvalSettings(tokenizer=object())}, ("tokenizer", "object")),
        ({"limit": 0}, ("limit", 0)),
    ],
)
def test_what_cannot_be_passed_on_is_refused(options, named):
    with refused(ml.BadInput, *named):
        ml.evaluate("demo", TASKS, **options)


@pytest.mark.slow
def test_errors_are_those_of_an_evaluation_in_place(math_task):
    quiet = EvalSettings(progress=False)
    with refused(ml.BadInput, "subject", "anatom"):
        ml.evaluate("demo", "mmlu_5shot::anatom", settings=quiet)
    with refused(ml.ModelError, "model", "/not/a/model"):
        ml.evaluate("/not/a/model", TASKS, settings=quiet)
    Path(math_task).with_name("gold.py").write_text("def gold(document, results):\n    return 1 / 0\n")
    with refused(ml.RunError, "own_process", "ZeroDivisionError"):
        ml.evaluate("demo", math_task, settings=quiet)


def test_a_loaded_model_is_not_loaded_by_other_options(demo):
    with refused(ml.BadInput, "loading"):
        ml.evaluate(demo, TASKS, settings=EvalSettings(loading={"dtype": "bfloat16"}))


@pytest.mark.slow
def test_options_of_loading_and_routing_go_along(demo):
    settings = EvalSettings(progress=False, routing=True, loading={"dtype": "bfloat16"})
    log = ml.evaluate("demo", TASKS[0], limit=2, settings=settings)
    assert log.meta["model"]["dtype"] == "bfloat16"
    assert ml.evals.sample_share(log)["estimate"].sum("expert").values == pytest.approx(1)


FOLLOWED = """
import sys, psutil
import mixlens as ml
def tell(done, total):
    if done:  # the first answers are kept
        print(psutil.Process().children()[0].pid, flush=True)
ml.evaluate("demo", "demo", out=sys.argv[1], settings=ml.evals.EvalSettings(progress=tell, batch_size=1))
"""


@pytest.mark.slow
def test_it_ends_when_its_caller_is_killed(tmp_path):
    caller = subprocess.Popen([sys.executable, "-c", FOLLOWED, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert caller.stdout is not None
    evaluating = psutil.Process(int(caller.stdout.readline()))
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert psutil.wait_procs([evaluating], timeout=60)[1] == []
    assert (tmp_path / "run" / PARTIAL).exists()


def test_several_processes_are_refused(demo, monkeypatch):
    monkeypatch.setattr(runner, "processes", lambda: SimpleNamespace(world=2))
    with refused(ml.BadInput, "processes", 2):
        ml.evaluate(demo, TASKS)


@pytest.mark.slow
def test_several_processes_of_a_launcher_are_refused():
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    )  # what accelerate launch starts them with
    script = Path(__file__).with_name("evaluate_twice.py")
    done = subprocess.run([sys.executable, *launcher, str(script)], capture_output=True, text=True)
    assert done.stdout.count("BadInput: processes 2\n") == 2


# ---------------------------------------------------------------------- in a notebook's kernel

CELL = """
import mixlens as ml
log = ml.evaluate("demo", {tasks}, out={out!r}, settings=ml.evals.EvalSettings(batch_size=1{more}))
print("ended", len(log.records), log.samples["math_equal"].dropna().tolist())
"""


@pytest.mark.slow
def test_in_a_kernel_it_shows_progress_is_interrupted_and_goes_on(demo, math_task, tmp_path):
    tasks, out = [*TASKS, math_task], str(tmp_path / "run")
    manager, client = start_new_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        cell = CELL.format(tasks=tasks, out=out, more=", progress=lambda done, total: print(done, 'of', total)")
        shown: Queue[str] = Queue()

        def interrupt_after_the_first_answers(message: dict) -> None:
            text = message["content"].get("text", "")
            shown.put(text)
            if f"{len(TASKS)} of" in text and shown.qsize() < 50:
                manager.interrupt_kernel()

        reply = client.execute_interactive(cell, timeout=300, output_hook=interrupt_after_the_first_answers)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        kept = Answers(Path(out) / PARTIAL).by_key
        assert 2 <= len(kept) < 486
        texts: list[str] = []
        cell = CELL.format(tasks=tasks, out=out, more="")
        reply = client.execute_interactive(
            cell, timeout=300, output_hook=lambda message: texts.append(message["content"].get("text", ""))
        )
        assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert f"ended 126 {[1.0] * len(PROBLEMS)}" in "".join(texts)
    assert "evaluate: 100%" in "".join(texts)
    resumed = ml.evals.Log.open(out)
    assert resumed.records == ml.evaluate(demo, tasks, settings=EvalSettings(progress=False, batch_size=1)).records


def test_settings_arrive_as_they_are_or_are_refused():
    job = runner.job_of("demo", protocol=None, data=None, limit=3, settings=EvalSettings())
    sent = EvalSettings(
        max_length=np.int64(512), revisions=MappingProxyType({"a/b": "c"}), loading={"dtype": torch.bfloat16}
    )
    asked = json.loads(own_process._asked("demo", job, "out", sent))
    assert (asked["settings"]["max_length"], asked["settings"]["revisions"]) == (512, {"a/b": "c"})
    assert asked["loading"] == {"dtype": "bfloat16"}
    with refused(ml.BadInput, "settings", "set"):
        own_process._asked("demo", job, "out", EvalSettings(loading={"quantization": {"nf4"}}))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"tasks": None}, "tasks"),
        ({"tasks": [1]}, "tasks"),
        ({"tasks": []}, "tasks"),
        ({"limit": float("nan")}, "limit"),
        ({"limit": "3"}, "limit"),
        ({"settings": EvalSettings(batch_size=0)}, "batch_size"),
        ({"settings": EvalSettings(batch_size="3")}, "batch_size"),
        ({"settings": EvalSettings(batch_size=2.5)}, "batch_size"),
        ({"settings": {}}, "settings"),
    ],
)
def test_what_is_nothing_to_evaluate_is_said_before_a_model_is_loaded(asked, named):
    with refused(ml.BadInput, named):
        ml.evaluate("demo", **{"tasks": "demo", **asked})
