"""Benchmarks from the Hub, a scripted one on 127.0.0.1: every protocol, revisions, the cache, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from evals_parts import PROBLEMS, SUBJECTS, small_mixtral
from hub_data import GSM8K, HUMANEVAL, mbpp_rows, publish, write_folder
from scripted_hub import Hub, asking, scripted_hub

import mixlens as ml
from mixlens.evals.protocols import Protocol, protocol_names, suites, tasks_folder
from mixlens.models.demo import demo_path

# A model that always answers right, whatever the task; then every request as it is read from the Hub, from the folder
# with the same rows, and by lm-eval's own task files.
EVERYTHING = """
import json, sys
import mixlens as ml
from lm_eval.api.model import LM
from mixlens.evals.lm_eval_grading import Job, load_tasks
from mixlens.evals.preflight import gold_of
from mixlens.models.demo import demo_path
from transformers import AutoTokenizer

names, local, stock, folder = json.loads(sys.argv[1])

def asked(job):
    loaded = load_tasks(job)
    return loaded, loaded.build(job, lambda history, **_: json.dumps(history))

def shown(requests):
    return [[r.task_name, *map(str, r.args)] for r in requests]

class Right(LM):
    tokenizer_name = "none"
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    def apply_chat_template(self, history, add_generation_prompt=True):
        return json.dumps(history)
    def answer(self, requests):
        tasks = loaded.tasks  # none of the preflight's questions
        return [gold_of(self, tasks[r.task_name], r.request_type, r) if r.task_name in tasks else "" for r in requests]
    loglikelihood = generate_until = answer
    loglikelihood_rolling = None

loaded, _ = asked(Job(tuple(names), limit=2).at_commits({}))
log = ml.evaluate(Right(), names, limit=2, settings=ml.evals.EvalSettings(progress=False))
_, from_hub = asked(Job(tuple(local), limit=2).at_commits({}))
_, from_folder = asked(Job(tuple(local), limit=2, root=folder))
_, by_lm_eval = asked(Job(tuple(stock), limit=2))
print(json.dumps({"records": log.records, "tasks": log.meta["tasks"], "from_hub": shown(from_hub),
                  "from_folder": shown(from_folder), "by_lm_eval": shown(by_lm_eval)}))
"""
# Evaluates with the demo model, killing itself after so many batches, and prints the outcome.
EVALUATE = """
import json, os, signal, sys
import mixlens as ml
from mixlens.evals import response_cache as answers
add, count = answers.Answers.add, [0]
def add_and_end(self, *given):
    add(self, *given)
    count[0] += 1
    if count[0] == batches:
        os.kill(os.getpid(), signal.SIGKILL)
answers.Answers.add = add_and_end
outcomes = []
for tasks, arguments, settings, batches in json.loads(sys.argv[1]):
    settings = ml.evals.EvalSettings(progress=False, batch_size=1, **settings)
    try:
        log = ml.evaluate(ml.load("demo", verbose=False), tasks, settings=settings, **arguments)
        outcomes.append({"revision": {about["data"]["revision"] for about in log.meta["tasks"].values()}.pop(),
                         "prompts": "".join(log.samples["prompt"]), "targets": log.samples["target"].tolist()})
    except ml.MixlensError as error:
        outcomes.append(f"{type(error).__name__}: {error}")
print(json.dumps(outcomes))
"""
MMLU_DE = "mmlu_de_5shot"
pytestmark = pytest.mark.slow  # a new process has its own Hub and cache, and takes seconds to import torch and lm-eval


@pytest.fixture
def hub():
    with scripted_hub() as hub:
        yield hub


def in_a_child(hub: Hub | str, home: Path, code: str, asked: Any, **more: str) -> Any:
    """What the code prints last, as JSON; None where it was killed."""
    command = [sys.executable, "-c", code, json.dumps(asked)]
    done = subprocess.run(command, env=asking(hub, home, **more), capture_output=True, text=True)
    assert done.returncode in (0, -9), done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def part_of(name: str) -> str:
    """One task of a protocol."""
    subject = {"mmlu_5shot": "anatomy", "mmlu_5shot_generative": "virology", "math_4shot": "algebra"}
    return name + (f"::{subject[name]}" if name in subject else "::algebra" if name == "math_4shot_maj4" else "")


def protocol(name: str) -> Protocol:
    return Protocol(name, tasks_folder() / f"{name}.yaml")


def test_every_protocol_reads_the_schema_of_its_data_set(hub, tmp_path):
    commits, folder = publish(hub), write_folder(tmp_path / "data")
    names = [part_of(name) for name in protocol_names() if protocol(name).about.get("hub")]
    local = [name for name in names if not protocol(name.partition("::")[0]).about["hub"].startswith("m_")]
    stock = {
        "arc_challenge_0shot": "arc/arc_challenge",
        "arc_easy_0shot": "arc/arc_easy",
        "arc_challenge_fr_0shot": "okapi/arc_multilingual/arc_fr",
        "hellaswag_0shot": "hellaswag/hellaswag",
        "hellaswag_de_0shot": "okapi/hellaswag_multilingual/hellaswag_de",
        "mmlu_5shot::anatomy": "mmlu/default/mmlu_anatomy",
        "mmlu_it_5shot": "okapi/mmlu_multilingual/m_mmlu_it",
        "gsm8k_5shot": "gsm8k/gsm8k",
        "math_4shot::algebra": "minerva_math/minerva_math_algebra",
    }
    files = [str(Path(lm_eval.tasks.__file__).parent / f"{path}.yaml") for path in stock.values()]
    found = in_a_child(hub, tmp_path / "home", EVERYTHING, [names, local, files, str(folder)])
    assert len(names) == 27
    records = {name: [r for r in found["records"] if r["task"] == name] for name in names}
    for name in names:
        data = found["tasks"][name]["data"]
        assert (data["from"], data["revision"]) == ("Hub", commits[data["repository"]])
        assert [record["correct"] for record in records[name]] == [1.0, 1.0], name
    assert found["from_hub"] == found["from_folder"]
    assert [r["target"] for r in records["arc_challenge_0shot"]] == [" ice", " a wren"]
    assert [r["target"] for r in records["arc_challenge_it_0shot"]] == [" ice", " a wren"]
    assert [r["target"] for r in records["hellaswag_fr_0shot"]] == [
        " dries it. Then rests.",
        " Rub, then rinse.",
    ]
    assert [r["target"] for r in records["mmlu_de_5shot"]] == [" A", " A"]
    assert [r["target"] for r in records["gsm8k_8shot_maj8"]] == [answer for _, answer in GSM8K[-3:-1]]
    assert [r["target"] for r in records["math_4shot_maj4::algebra"]] == [solution for _, solution in PROBLEMS[:2]]
    assert [r["target"] for r in records["humaneval_0shot"]] == [p["canonical_solution"] for p in HUMANEVAL[:2]]
    code = [row["code"].replace("\r", "") + "\n[DONE]" for row in mbpp_rows((11, 12))]
    assert [r["target"] for r in records["mbpp_3shot_sanitized"]] == code
    for ours, path in stock.items():
        of_theirs = [r[1:] for r in found["by_lm_eval"] if r[0] == Path(path).name]
        of_ours = [[r["prompt"], choice] for r in records[ours] for choice in r["choices"] or [None]]
        assert [question_of(prompt) for prompt, _ in of_ours] == [question_of(prompt) for prompt, _ in of_theirs], ours
        if of_ours[0][1] is not None:
            assert [choice for _, choice in of_ours] == [choice for _, choice in of_theirs], ours


def question_of(prompt: str) -> str:
    """The question itself, behind any examples and description."""
    return prompt.rpartition("Problem:\n")[2] if "Problem:\n" in prompt else prompt.split("\n\n")[-1]


def evaluate_in_children(hub: Hub | str, home: Path, *asked: tuple[Any, ...], **more: str) -> list[Any]:
    """Each of (tasks, arguments, settings, batches)."""
    return in_a_child(hub, home, EVALUATE, [(*one, {}, 0)[:4] for one in asked], **more)


def test_a_run_keeps_the_commit_that_it_began_with(hub, tmp_path):
    name = "alexandrainst/m_mmlu"
    old = publish(hub)[name]
    home, limited = tmp_path / "home", {"limit": 3}
    asked, pinned = ([MMLU_DE], {"out": str(tmp_path / "run"), **limited}), {"revisions": {name: old}}
    assert evaluate_in_children(hub, home, (*asked, {}, 1)) is None
    files = hub.repositories["datasets", name].commits[old]
    new = hub.commit("datasets", name, {path: text.replace(b"corners", b"edges") for path, text in files.items()})
    moved, resumed, fresh, chosen = evaluate_in_children(
        hub,
        home,
        (*asked, {"revisions": {name: "main"}}),
        asked,
        ([MMLU_DE], limited),
        ([MMLU_DE], limited, pinned),
    )
    assert moved.startswith("RunError: ")
    assert all(named in moved for named in (name, old, new)), moved
    assert (resumed["revision"], fresh["revision"], chosen["revision"]) == (old, new, old)
    assert ("corners" in resumed["prompts"], "edges" in resumed["prompts"]) == (True, False)
    assert ("corners" in fresh["prompts"], "edges" in fresh["prompts"]) == (False, True)
    assert resumed == chosen
    before = len(hub.asked)
    assert evaluate_in_children(hub, home, ([MMLU_DE], limited)) == [fresh]
    assert hub.asked[before:] == [f"GET /api/datasets/{name}"]  # for main's commit; at that, everything is cached
    before = len(hub.asked)
    again = (asked, ([MMLU_DE], limited), ([MMLU_DE], limited, pinned))
    assert evaluate_in_children(hub, home, *again, HF_HUB_OFFLINE="1") == [resumed, fresh, chosen]
    assert len(hub.asked) == before


def test_what_the_hub_refuses_is_said_before_a_model_is_asked(hub, tmp_path):
    publish(hub)
    hub.refuse("datasets", "openai/gsm8k", 401, "GatedRepo")
    hub.refuse("datasets", "cais/mmlu", 503)
    del hub.repositories["datasets", "Rowan/hellaswag"]
    rows = hub.repositories["datasets", "allenai/ai2_arc"]
    renamed = {path.replace("test-", "eval-"): content for path, content in rows.commits[rows.main].items()}
    hub.commit("datasets", "allenai/ai2_arc", renamed | {"README.md": renamed["README.md"].replace(b"test", b"eval")})
    gated, down, gone, other, absent, stranger = evaluate_in_children(
        hub,
        tmp_path / "home",
        (["gsm8k_5shot"], {}),
        (["mmlu_5shot::anatomy"], {}),
        (["hellaswag_0shot"], {}),
        (["arc_easy_0shot"], {}),
        ([MMLU_DE], {}, {"revisions": {"alexandrainst/m_mmlu": "v9"}}),
        ([MMLU_DE], {}, {"revisions": {"cais/mmlu": "main"}}),
    )
    for said, names in (
        (gated, ("openai/gsm8k", "hf auth login")),
        (down, ("cais/mmlu", "503")),
        (gone, ("Rowan/hellaswag", "private")),
        (other, ("arc_easy_0shot", "KeyError: 'test'")),
        (absent, ("alexandrainst/m_mmlu", "revision")),
        (stranger, ("cais/mmlu", "alexandrainst/m_mmlu")),
    ):
        assert said.startswith("BadInput: ")
        assert all(name in said for name in names)
    (away,) = evaluate_in_children("http://127.0.0.1:9", tmp_path / "home", ([MMLU_DE], {}))
    assert "cannot be reached" in away


def test_the_suite_of_the_paper_from_the_command_line(hub, tmp_path):
    subjects = [member["task"] for member in protocol("mmlu_5shot").config["task"]]
    commits = publish(hub, mmlu=subjects, math=SUBJECTS)
    model, out = tmp_path / "model", tmp_path / "run"
    small_mixtral(4096).save_pretrained(model)  # most of the time goes into sampling
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_path() / name, model)
    command, environment = [sys.executable, "-m", "mixlens.cli.main"], asking(hub, tmp_path / "home")
    done = subprocess.run(
        [*command, "eval", str(model), "mixtral-paper", "--limit", "1", "--out", str(out), "--json"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = ml.evals.Log.open(out)
    asked = {about["protocol"] for about in log.meta["tasks"].values()}
    assert asked == set(suites()["mixtral-paper"].values())
    assert {about["data"]["repository"]: about["data"]["revision"] for about in log.meta["tasks"].values()} == commits
    assert len(log.records) == 57 + 7 + 18
    page = tmp_path / "report.html"
    done = subprocess.run([*command, "report", str(out), "--out", str(page)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = page.read_text("utf-8")
    assert "MMLU in French, 5-shot" in text
    assert [name for name, commit in commits.items() if f"{name} at {commit[:12]}" not in text] == []
