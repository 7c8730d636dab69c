"""Answers of real servers, replayed, and of servers that send what is no routing."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.hostile import VALUES, replaced
from helpers.refusals import refused
from helpers.routing_server import FORMS, int32, npy

import mixlens as ml
from mixlens.engines.check import Checker, Routers
from mixlens.engines.replies import routed
from mixlens.engines.server import prompt_logprobs

KEPT = json.loads((Path(__file__).parent / "vllm_0_32_0.json").read_text("utf-8"))
ROUTERS = Routers(n_experts=8, top_k=2, layers=tuple(range(8)), n_layers=8)
IDS = np.tile([[1, 2]], (5, 8, 1))


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_what_vllm_answered_is_what_transformers_routes(kind, demo):
    answer = KEPT[kind]
    found = routed(answer, ROUTERS)
    assert (found.form, found.generated) == ("vllm", 4)
    assert len(found.token_ids) == answer["usage"]["total_tokens"]
    with ml.Recorder(demo, signals=[]) as recorder, torch.no_grad():
        scores = demo(torch.tensor([found.token_ids[:-1]])).logits[0].log_softmax(-1)
    assert np.array_equal(found.checked(Checker(ROUTERS)), recorder.trace().read("expert_id"))
    listed = answer["choices"][0].get("prompt_logprobs")
    for place, one in enumerate(listed or [], start=-1):
        for token, score in (one or {}).items():
            assert score["logprob"] == pytest.approx(float(scores[place, int(token)]), abs=1e-4)


def test_sglangs_own_call_is_read():
    answer = {"text": "", "meta_info": {"prompt_tokens": 4, "completion_tokens": 2, "routed_experts": int32(IDS)}}
    found = routed(answer, ROUTERS)
    assert (found.form, found.prompt, found.generated, found.token_ids) == ("sglang", 4, 2, None)
    assert np.array_equal(found.ids, IDS)


def test_sglang_counts_layers_without_routers_in():
    sparse = Routers(n_experts=8, top_k=2, layers=tuple(range(2, 8)), n_layers=8)
    whole = np.concatenate([np.zeros((5, 2, 2), int), IDS[:, :6] + np.arange(5)[:, None, None]], axis=1)
    answer = {"meta_info": {"prompt_tokens": 4, "completion_tokens": 2, "routed_experts": int32(whole)}}
    assert np.array_equal(routed(answer, sparse).checked(Checker(sparse)), whole[:, 2:])


def test_an_answer_without_routing_has_none():
    assert routed({"choices": [{"text": "a", "routed_experts": None}], "usage": {}}, ROUTERS) is None


@pytest.mark.parametrize(
    "sent",
    [
        "no base64!",
        npy(IDS)[:40],
        npy(IDS)[:-8],
        int32(IDS)[:-8],
        17,
        ["AAAA"],
        "",
        npy(np.zeros((0, 8, 2))),
        npy(IDS.ravel()),
    ],
)
def test_what_is_no_array_of_ids_is_refused_by_name(sent):
    answer = {"choices": [{"routed_experts": sent, "prompt_token_ids": [1, 2, 3, 4], "token_ids": [5, 6]}]}
    with pytest.raises(ml.SourceError) as error:
        routed(answer, ROUTERS).checked(Checker(ROUTERS))
    assert error.value.argument in ("shape", "missing_rows")


def header(text):
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()).decode()


ARRAYS = [
    npy(IDS.astype(float)), npy(IDS.astype("M8[s]")), npy(np.zeros((5, 8, 2), [("a", int)])), npy(IDS[:, :0]),
    npy(-IDS.astype(int)), header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 8, 2)}\n"),
    header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"), header("(" * 5000 + "\n"), header("-" * 9000),
]  # fmt: skip


def complete(answer):
    """As Endpoint.complete has seen."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)


@pytest.mark.parametrize("kind", ["vllm", "vllm_021", "sglang"])
def test_whatever_stands_in_an_answer_it_is_read_or_refused(kind):
    answer = FORMS[kind](IDS, [1, 2, 3, 4], [5, 6]) | {"routed_experts_prompt_start": 0}
    logprobs = [None, {"2": {"logprob": -1.0}}, {"3": {"logprob": -2.0}}, {"4": {"logprob": -1e-9}}]
    answer["choices"] = [{**one, "prompt_logprobs": logprobs} for one in answer.get("choices", [{}])]
    tokens = np.array([1, 2, 3, 4])
    assert np.isfinite(prompt_logprobs(answer, tokens)[1:]).all()
    read = refusals = 0
    for value in (*VALUES, *ARRAYS):
        for changed in replaced(answer, value):
            if not complete(changed):
                continue
            try:
                found = routed(changed, ROUTERS, prompt_ids=[1, 2, 3, 4])
                ids = None if found is None else found.checked(Checker(ROUTERS))
                scores = prompt_logprobs(changed, tokens)
            except ml.SourceError:
                refusals += 1
                continue
            read += 1
            assert ids is None or np.array_equal(ids, IDS[:5])
            assert scores is None or not np.isinf(scores).any()
    assert read > 30
    assert refusals > 100


def test_an_answer_without_counts_is_refused():
    with refused(ml.SourceError, "shape"):
        routed({"choices": [{"routed_experts": npy(IDS)}]}, ROUTERS)
