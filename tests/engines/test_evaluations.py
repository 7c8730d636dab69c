"""Evaluations over a server that returns routing keep that of every question."""

import json

import datasets
import numpy as np
import pytest
from helpers.refusals import refused
from helpers.routing_server import serving
from transformers import AutoTokenizer

import mixlens as ml
from mixlens.models.demo import demo_path

QUESTIONS = [{"start": "Once upon a", "end": "time"}, {"start": "He opened the", "end": "door"}]
WRITING = """
task: my_endings
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{end}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1}
"""
SETTINGS = ml.evals.EvalSettings(progress=False, routing=True, tokenizer=str(demo_path()), max_new_tokens=6)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_path())


@pytest.fixture
def writing(tmp_path, monkeypatch):
    """A task file whose answers are generated."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    path = tmp_path / "writing.yaml"
    path.write_text(WRITING.replace("FOLDER", str(tmp_path)))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_every_question_has_the_routing_that_the_model_gives_here(form, demo, tokenizer, writing):
    here = ml.evaluate(demo, writing, settings=SETTINGS)
    with serving(demo, tokenizer, form) as (url, _):
        server = ml.Endpoint(url, model="served", protocol="openai-completions", routing=True)
        there = ml.evaluate(server, writing, settings=SETTINGS)
    assert [r["sample_id"] for r in there.records] == [r["sample_id"] for r in here.records]
    for number, _ in enumerate(QUESTIONS):  # a model here is asked in the order of lengths
        one, other = (log.routing.select(where={"sample_id": number}) for log in (there, here))
        assert one.sequences["outcome"].tolist() == other.sequences["outcome"].tolist()
        for name in ("phase", "expert_id"):
            assert np.array_equal(one.read(name), other.read(name)), name
    assert there.routing.meta["source_check"]["requests"] == len(there.records)
    share = ml.evals.sample_share(there)["estimate"]
    assert share.equals(ml.evals.sample_share(here)["estimate"])


def test_a_server_that_is_not_asked_for_routing_is_refused():
    server = ml.Endpoint("http://127.0.0.1:9/v1", model="served", protocol="openai-completions")
    with refused(ml.BadInput, "routing", False):
        ml.evaluate(server, "demo_0shot::agreement", limit=1, settings=SETTINGS)
