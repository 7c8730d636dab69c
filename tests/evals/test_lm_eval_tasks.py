"""Tasks that are not mixlens's: lm-eval's own by name, and task files of one's own, on data that lies here."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers.refusals import refused
from scripted_hub import asking, scripted_hub

import mixlens as ml
from mixlens.evals.model import tokenizer_of
from mixlens.evals.protocols import check_tasks
from mixlens.evals.runner import EvalSettings

PAGES = [
    "The router of a mixture sends every token to two of its experts , and adds up what they say .",
    "It was a bright day . The children went to the sea , and the dog ran before them along the water .",
]
QUESTIONS = [
    {"start": "Once upon a", "ends": [" time", " stone", " seven"], "right": 0},
    {"start": "He opened the", "ends": [" of", " door", " were"], "right": 1},
    {"start": "We thank you for your", "ends": [" under", " is", " help"], "right": 2},
]
CHOOSING = """
task: my_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
target_delimiter: ""
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}]
metadata: {version: 3}
"""
QUIET = EvalSettings(progress=False)


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


@pytest.fixture
def choosing(tmp_path, monkeypatch) -> Path:
    """A task file in lm-eval's format beside its data."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "questions.jsonl").write_text(lines)
    path = tmp_path / "choosing.yaml"
    path.write_text(CHOOSING.replace("FOLDER", str(tmp_path)))
    return path


@pytest.fixture
def wikitext(monkeypatch) -> None:
    """lm-eval's own wikitext asks the Hub for its pages, and gets these."""

    def load(path: str, name: str, **_) -> datasets.DatasetDict:
        assert (path, name) == ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1")
        pages = datasets.Dataset.from_list([{"page": page} for page in PAGES])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), pages))

    monkeypatch.setattr(datasets, "load_dataset", load)


def logprob(model, ids: list[int], max_length: int) -> float:
    """Of all tokens but the first, each read behind what a window of max_length tokens leaves of those before it."""
    total = 0.0
    for first in range(1, len(ids), max_length):
        last = min(first + max_length, len(ids)) - 1
        start = max(0, last - max_length)
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([ids[start:last]])).logits[0].double(), -1)
        total += sum(float(scores[place - 1 - start, ids[place]]) for place in range(first, last + 1))
    return total


@pytest.mark.parametrize("max_length", [None, 7])
def test_a_perplexity_is_that_of_the_tokens_one_by_one(demo, wikitext, max_length):
    log = ml.evaluate(demo, "wikitext", settings=EvalSettings(progress=False, max_length=max_length))
    tokenizer = tokenizer_of(demo)
    expected = []
    for page, record in zip(PAGES, log.records, strict=True):
        text = page.replace(" , ", ", ").replace(" . ", ". ")
        assert record["target"] == text
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        expected.append(logprob(demo, ids, max_length or 10_000))
        assert record["logprobs"] == pytest.approx([expected[-1]], rel=1e-5)
    words, characters = (sum(map(len, parts)) for parts in ([page.split() for page in PAGES], PAGES))
    scores = log.scores.set_index("metric")
    assert scores.score["word_perplexity"] == pytest.approx(math.exp(-sum(expected) / words), rel=1e-5)
    assert scores.score["bits_per_byte"] == pytest.approx(-sum(expected) / characters / math.log(2), rel=1e-5)
    assert (scores.n == len(PAGES)).all()
    assert log.meta["tasks"]["wikitext"]["metrics"]["word_perplexity"]["higher_is_better"] is False


def test_routing_of_a_perplexity_holds_every_token_once(demo, wikitext):
    plain = ml.evaluate(demo, "wikitext", settings=EvalSettings(progress=False, max_length=7))
    log = ml.evaluate(demo, "wikitext", settings=EvalSettings(progress=False, max_length=7, routing=True))
    assert [r["logprobs"] for r in log.records] == [r["logprobs"] for r in plain.records]
    rows = log.routing.sequences
    assert set(rows["task"]) == {"wikitext"}
    assert rows["length"].max() == 7
    assert rows["document_id"].nunique() == len(PAGES)
    assert ml.evals.sample_share(log, by="task")["estimate"].sum("expert").values == pytest.approx(1)


def test_a_task_file_of_ones_own_is_scored_and_its_data_is_named(demo, choosing):
    log = ml.evaluate(demo, str(choosing), settings=QUIET)
    tokenizer = tokenizer_of(demo)
    for question, record in zip(QUESTIONS, log.records, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(question["start"], add_special_tokens=False)]
        whole = [tokenizer.encode(question["start"] + end, add_special_tokens=False) for end in question["ends"]]
        scores = [logprob(demo, [ids[0], *of], 10_000) - logprob(demo, ids, 10_000) for of in whole]
        assert record["logprobs"] == pytest.approx(scores, abs=1e-4)
        assert (record["gold"], record["choices"]) == (question["right"], question["ends"])
        assert record["correct"] == float(scores.index(max(scores)) == question["right"])
    about = log.meta["tasks"]["my_choices"]
    assert (about["protocol"], about["version"]) == ("lm-eval my_choices", "3")
    digest = hashlib.sha256((choosing.parent / "questions.jsonl").read_bytes()).hexdigest()
    assert about["data"] == {
        "from": "files", "repository": None, "revision": None, "sha256": {"questions.jsonl": digest},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n", ("tasks",)),
        ("task: [", ("tasks",)),
        ("nothing: here\n", ("tasks",)),
    ],
)
def test_a_task_file_that_cannot_be_loaded_is_refused(demo, tmp_path, text, named):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with refused(ml.BadInput, *named):
        ml.evaluate(demo, str(path), settings=QUIET)


def test_a_name_that_nobody_has_is_told_from_one_whose_data_is_not_here(demo):
    with refused(ml.BadInput, "tasks", "sciq") as known:
        ml.evaluate(demo, "sciq", settings=QUIET)
    with refused(ml.BadInput, "tasks", "sciqq") as unknown:
        ml.evaluate(demo, "sciqq", settings=QUIET)
    assert known.value.__cause__ is not None  # what lm-eval said when it loaded the task
    assert unknown.value.__cause__ is None


def test_files_of_a_benchmark_are_named_by_their_checksums(demo, shared):
    log = ml.evaluate(demo, "mmlu_5shot::anatomy", data=shared / "data", limit=1, settings=QUIET)
    sums = log.meta["tasks"]["mmlu_5shot::anatomy"]["data"]["sha256"]
    folder = shared / "data" / "mmlu" / "test"
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  test/{p.name}\n" for p in sorted(folder.glob("*_test.csv"))
    ]
    assert len(lines) == 57
    assert hashlib.sha256("".join(lines).encode()).hexdigest() in sums.values()
    assert all(name.startswith("mmlu/") for name in sums)


@pytest.mark.slow
def test_a_task_of_lm_eval_from_the_hub_names_the_commit_that_was_read(tmp_path):
    rows = [
        {"goal": f"To open door {n},", "sol1": "turn its handle.", "sol2": "sing to it.", "label": 0} for n in (1, 2)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with scripted_hub() as hub:
        hub.commit("datasets", "baber/piqa", {"train.jsonl": content[:1], "validation.jsonl": content[:1]})
        commit = hub.commit("datasets", "baber/piqa", {"train.jsonl": content, "validation.jsonl": content})
        command = [sys.executable, "-m", "mixlens", "eval", "demo", "piqa", "--out", str(tmp_path / "run"), "--json"]
        done = subprocess.run(command, env=asking(hub, tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {row["metric"] for row in json.loads(done.stdout)["scores"]} == {"acc", "acc_norm"}
    about = ml.open(tmp_path / "run").meta["tasks"]["piqa"]
    assert about["data"] == {"from": "Hub", "repository": "baber/piqa", "revision": commit}


def test_two_tasks_of_one_name_are_refused(demo, choosing):
    other = choosing.with_name("other.yaml")
    other.write_text(choosing.read_text().replace("version: 3", "version: 4").replace("{{start}}", "Go on: {{start}}"))
    with refused(ml.BadInput, "tasks", "my_choices"):
        ml.evaluate(demo, [str(choosing), str(other)], settings=QUIET)
    assert len(ml.evaluate(demo, [str(choosing), str(choosing)], settings=QUIET).records) == len(QUESTIONS)


def test_a_task_file_that_grades_otherwise_is_another_evaluation(demo, choosing, tmp_path):
    out = tmp_path / "run"
    ml.evaluate(demo, str(choosing), out=out, settings=QUIET)
    choosing.write_text(choosing.read_text().replace('"{{right}}"', '"{{(right + 1) % 3}}"'))
    with refused(ml.RunError, "out", ["input_sha256"]):
        ml.evaluate(demo, str(choosing), out=out, settings=QUIET)


def test_an_unknown_task_is_refused_without_the_libraries_that_would_run_it():
    """They take many seconds to import."""
    code = (
        "import sys; from mixlens.cli import main as cli; status = cli.main(['eval', 'demo', 'nosuchtask']);"
        "sys.exit(status if not {'torch', 'lm_eval'} & set(sys.modules) else 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert "nosuchtask" in found.stderr


def test_tasks_groups_and_tags_are_known_by_name():
    check_tasks(["arc_easy", "glue", "leaderboard_math_hard", "demo"])
    with refused(ml.BadInput, "tasks", "arc_easyy"):
        check_tasks(["arc_easy", "arc_easyy"])
