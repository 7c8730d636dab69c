"""Chats: written by the tokenizer's template, and what the assistant said told from the rest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.refusals import refused

import mixlens as ml

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}[{{ m.role }}] {{ m.content }} [/]"
    "{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a river?"},
    {"role": "assistant", "content": "Water that flows."},
    {"role": "user", "content": "And a lake?"},
    {"role": "assistant", "content": "Water that stands."},
]
QUIET = ml.RecordSettings(progress=False)


@pytest.fixture(scope="module")
def model():
    return ml.load("demo", verbose=False)


@pytest.fixture
def tokenizer(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("column", ["messages", "text"])
def test_what_the_assistant_said_is_generated(model, tokenizer, column):
    trace = ml.record(model, [{column: CHAT, "condition": "a"}], tokenizer=tokenizer, settings=QUIET)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert trace.read("token_id").tolist() == ids
    said = trace.select(phase="generated").read("token_id")
    assert tokenizer.decode(said) == "Water that flows.</s> Water that stands.</s>"
    rest = trace.select(phase="prompt").read("token_id")
    assert tokenizer.decode(rest).count("Water") == 0
    assert len(said) + len(rest) == len(ids)


def test_phases_stay_with_their_tokens_when_a_chat_is_split(model, tokenizer, tmp_path):
    whole = ml.record(model, [CHAT], tokenizer=tokenizer, settings=QUIET)
    cut = ml.RecordSettings(progress=False, max_length=7, overlong="split")
    documents = [{"text": CHAT}, {"text": "A text beside it."}]
    split = ml.record(model, documents, tokenizer=tokenizer, settings=cut, out=tmp_path / "run")
    first = split.select(where={"document_id": 0})
    np.testing.assert_array_equal(first.read("phase"), whole.read("phase"))
    assert (split.select(where={"document_id": 1}).read("phase") == 0).all()


def test_chats_are_read_from_files(model, tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "id": "c"}) + "\n" + json.dumps({"messages": CHAT[1:], "id": "d"}))
    trace = ml.record(model, ml.documents(path), tokenizer=tokenizer, settings=QUIET)
    assert trace.sequences["document_id"].tolist() == ["c", "d"]
    assert trace.select(phase="generated").n_tokens > 0


def test_chats_that_cannot_be_read_are_refused(model, tokenizer):
    with refused(ml.BadInput, "messages", ["critic"]):
        ml.record(model, [[{"role": "critic", "content": "No."}]], tokenizer=tokenizer, settings=QUIET)
    with refused(ml.BadInput, "text", 0):
        ml.record(model, [[{"content": "No role."}]], tokenizer=tokenizer, settings=QUIET)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
    with refused(ml.BadInput, "messages", 2):
        ml.record(model, [CHAT], tokenizer=tokenizer, settings=QUIET)
    tokenizer.chat_template = None
    with refused(ml.BadInput, "tokenizer"):
        ml.record(model, [CHAT], tokenizer=tokenizer, settings=QUIET)
