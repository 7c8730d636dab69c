"""Answers of real servers, replayed, and of servers that send what is no routing."""

import base64
import io
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
from mixlens.engines.replies import columns_of_answers, routed
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


ROWS, PROMPT = 40, 30
RANDOM = np.argsort(np.random.default_rng(0).gumbel(size=(ROWS, 8, 8)), axis=-1)[..., :2]


def sent_as_it_is(ids: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, ids)
    return base64.b64encode(file.getvalue()).decode()


def repeated(start: int, stop: int, source: int) -> np.ndarray:
    ids = RANDOM.copy()
    ids[start:stop] = ids[source : source + stop - start]
    return ids


def put(where, value: int) -> np.ndarray:
    ids = RANDOM.copy()
    ids[where] = value
    return ids


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        (sent_as_it_is(RANDOM[1:]), "missing_rows"),
        (sent_as_it_is(RANDOM[PROMPT:]), "missing_rows"),  # the prompt's are not there
        (sent_as_it_is(np.concatenate([RANDOM, RANDOM[:1] + 0])), "last_token"),
        (sent_as_it_is(np.concatenate([RANDOM[:16], RANDOM])), "padding"),  # a prefix that was cached, twice
        (sent_as_it_is(repeated(16, 32, 0)), "stale_rows"),
        (sent_as_it_is(RANDOM.transpose(1, 0, 2)), "layers"),
        (sent_as_it_is(RANDOM[:, [0, 1, 2, 2, 4, 5, 6, 7]]), "layers"),
        (sent_as_it_is(put(np.s_[:, 3], 0)), "layers"),
        (sent_as_it_is(put(np.s_[:16], 0)), "duplicates"),  # rows of a cached prefix that were never written
        (sent_as_it_is(put(np.s_[5, 2, 1], -3)), "out_of_range"),
        (sent_as_it_is(RANDOM + 1), "out_of_range"),  # counted from 1
        (sent_as_it_is(RANDOM + 8 * np.arange(8)[:, None]), "out_of_range"),  # counted through all layers
        (sent_as_it_is(put(np.s_[:, 4, 1], -1)), "sentinels"),  # one layer chooses fewer
        (sent_as_it_is(RANDOM.reshape(ROWS, 16)), "shape"),
        (sent_as_it_is(RANDOM[None]), "shape"),
        (sent_as_it_is(RANDOM.astype(np.float32)), "shape"),
        (sent_as_it_is(RANDOM[..., :1]), "shape"),
        *((base64.b64encode(RANDOM.astype(kind).tobytes()).decode(), "shape") for kind in (">i4", "<i8", "<i2", "u1")),
    ],
)
def test_siblings_of_known_faults_are_named(sent, fault):
    choice = {"routed_experts": sent, "prompt_token_ids": [*range(PROMPT)], "token_ids": [*range(ROWS - PROMPT + 1)]}
    with refused(ml.SourceError, fault):
        routed({"choices": [choice]}, ROUTERS).checked(Checker(ROUTERS))


@pytest.mark.parametrize("about", [{"routed_experts_prompt_start": "x"}, {"routed_experts_prompt_start": 99}])
def test_rows_that_begin_nowhere_are_refused(about):
    choice = {"routed_experts": sent_as_it_is(RANDOM), "prompt_token_ids": [*range(PROMPT)], "token_ids": [*range(11)]}
    with refused(ml.SourceError, "shape"):
        routed({"choices": [choice], **about}, ROUTERS)


def test_rows_that_begin_within_the_prompt_keep_their_tokens_and_positions():
    tokens = np.arange(ROWS + 1)
    choice = {
        "routed_experts": sent_as_it_is(RANDOM[10:]),
        "prompt_token_ids": tokens[:PROMPT],
        "token_ids": tokens[PROMPT:],
    }
    choice = {name: sent if isinstance(sent, str) else sent.tolist() for name, sent in choice.items()}
    found = routed({"choices": [choice], "routed_experts_prompt_start": 10}, ROUTERS)
    columns = columns_of_answers([found], Checker(ROUTERS))
    assert np.array_equal(columns["position"], np.arange(10, ROWS))
    assert np.array_equal(columns["token_id"], np.arange(10, ROWS))
    assert columns["phase"].tolist() == [0] * 20 + [1] * 10
