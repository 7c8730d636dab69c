"""Faults of payloads, each seeded into the routing of real documents, found and named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixlens as ml
from mixlens.engines.check import FAULTS, Checker, Routers

PROMPT, GENERATED = 90, 39
ROUTERS = Routers(n_experts=8, top_k=2, layers=tuple(range(8)), n_layers=8)
OF_SPARSE = Routers(n_experts=8, top_k=2, layers=(1, 2, 3, 4, 5, 6, 7, 8), n_layers=10)


@pytest.fixture(scope="module")
def routing(demo):
    """Expert ids [token, layer, slot] and token ids of two documents."""
    documents = [document["text"] for document in ml.demo_documents()[:2]]
    quiet = ml.RecordSettings(progress=False, max_length=200, overlong="truncate")
    trace = ml.record(demo, documents, signals=[], settings=quiet)
    one, other = (trace.select(where={"document_id": number}) for number in (0, 1))
    return one.read("expert_id").astype(np.int32), one.read("token_id"), other.read("expert_id").astype(np.int32)


@pytest.fixture
def ids(routing):
    return routing[0][: PROMPT + GENERATED - 1].copy()


@pytest.fixture
def tokens(routing):
    return routing[1][: PROMPT + GENERATED]


def check(ids, tokens, *, routers=ROUTERS, before=None, **known):
    checker = Checker(routers)
    if before is not None:
        checker.check(before, prompt=len(before), generated=0, token_ids=np.arange(len(before)))
    found = checker.check(ids, prompt=PROMPT, generated=GENERATED, token_ids=tokens, **known)
    return found, checker.about()


def fault_of(*given, **known):
    with pytest.raises(ml.errors.SourceError) as error:
        check(*given, **known)
    return error.value.argument


def test_sound_routing_passes_as_it_is(ids, tokens):
    found, about = check(ids, tokens)
    assert np.array_equal(found, ids)
    assert found.dtype == np.uint8
    assert about["rows"] == len(ids)
    assert about["corrected"] == {}
    assert set(about["checked"]) == set(FAULTS)
    assert "stale_rows" not in about["partly_checked"]


def test_rows_that_the_recorder_dropped(ids, tokens):
    assert fault_of(np.delete(ids, range(32, 48), axis=0), tokens) == "missing_rows"


@pytest.mark.parametrize("sentinel", [-1, 255])
def test_sentinels(ids, tokens, sentinel):
    ids[40:44] = sentinel
    assert fault_of(ids, tokens) == "sentinels"
    ids[:] = sentinel
    assert fault_of(ids, tokens) == "sentinels"


def test_rows_of_a_block_that_another_request_had(ids, tokens, routing):
    other = routing[2]
    ids[64:80] = other[16:32]
    assert fault_of(ids, tokens, before=other) == "stale_rows"


def test_rows_of_a_block_of_the_same_request(ids, tokens):
    ids[96:112] = ids[16:32]
    assert fault_of(ids, tokens) == "stale_rows"


def test_a_prefix_that_two_requests_share_is_no_stale_block(ids, tokens):
    checker = Checker(ROUTERS)
    for _ in range(2):
        checker.check(ids, prompt=PROMPT, generated=GENERATED, token_ids=tokens)
    assert checker.about()["requests"] == 2


def test_routers_that_have_collapsed_are_not_taken_for_stale_blocks(tokens):
    ids = np.broadcast_to([0, 1], (PROMPT + GENERATED - 1, 8, 2))
    _, about = check(ids, tokens)
    assert "stale_rows" in about["partly_checked"]


def test_without_token_ids_stale_rows_are_said_to_be_unchecked(ids):
    _, about = check(ids, None)
    assert "stale_rows" in about["partly_checked"]


def test_an_expert_twice_for_one_token(ids, tokens):
    ids[7, 3] = 5
    assert fault_of(ids, tokens) == "duplicates"


def test_rows_that_were_never_written(ids, tokens):
    ids[:] = 0
    assert fault_of(ids, tokens) == "duplicates"


@pytest.mark.parametrize("wrong", [11, -7, 1000])
def test_ids_out_of_range(ids, tokens, wrong):
    ids[7, 3, 0] = wrong
    assert fault_of(ids, tokens) == "out_of_range"


def test_shared_experts_in_slots_of_their_own_are_left_out(ids, tokens):
    marked = np.concatenate([ids, np.full((*ids.shape[:2], 1), 8)], axis=2)
    found, about = check(marked, tokens)
    assert np.array_equal(found, ids)
    assert about["corrected"] == {"shared_experts": 1}


def test_shared_experts_in_the_place_of_routed_ones(ids, tokens):
    ids[..., 1] = 8
    assert fault_of(ids, tokens) == "shared_experts"
    odd = np.concatenate([ids[..., :1], np.arange(ids[..., :2].size).reshape(*ids.shape[:2], 2) % 9], axis=2)
    assert fault_of(odd, tokens) == "shared_experts"


def test_copies_made_for_load_balancing(ids, tokens):
    ids[ids == 3] = np.where(np.arange((ids == 3).sum()) % 2, 8, 3)  # two copies of expert 3
    assert fault_of(ids, tokens) == "physical_ids"
    assert fault_of(ids, tokens, routers=Routers(8, 2, tuple(range(8)), 8, n_physical=9)) == "physical_ids"


def test_empty_layers_without_routers_are_left_out(ids, tokens):
    whole = np.zeros((len(ids), 10, 2), np.int32)
    whole[:, 1:9] = ids
    found, about = check(whole, tokens, routers=OF_SPARSE)
    assert np.array_equal(found, ids)
    assert about["corrected"] == {"layers": 2}


def test_layers_offset_by_those_without_routers(ids, tokens):
    offset = np.zeros((len(ids), 10, 2), np.int32)
    offset[:, :8] = ids
    assert fault_of(offset, tokens, routers=OF_SPARSE) == "layers"
    cut = np.concatenate([np.zeros((len(ids), 1, 2), np.int32), ids[:, :7]], axis=1)
    assert fault_of(cut, tokens, routers=OF_SPARSE) == "layers"
    assert fault_of(ids[:, :5], tokens) == "layers"


@pytest.mark.parametrize("filler", [-1, 0, 255])
def test_an_empty_row_for_the_last_token_is_left_out(ids, tokens, filler):
    found, about = check(np.concatenate([ids, np.full_like(ids[:1], filler)]), tokens)
    assert np.array_equal(found, ids)
    assert about["corrected"] == {"last_token": 1}


def test_prompt_and_answer_misaligned_by_the_last_token(ids, tokens, routing):
    assert fault_of(routing[0][: PROMPT + GENERATED], tokens) == "last_token"
    assert fault_of(ids, tokens, prompt_rows=PROMPT - 1) == "last_token"


@pytest.mark.parametrize("before", [True, False])
def test_empty_rows_of_padding_are_left_out(ids, tokens, before):
    padding = np.zeros((9, *ids.shape[1:]), np.int32)
    found, about = check(np.concatenate([padding, ids] if before else [ids, padding]), tokens)
    assert np.array_equal(found, ids)
    assert about["corrected"] == {"padding": 9}


def test_padding_that_looks_like_routing(ids, tokens, routing):
    assert fault_of(np.concatenate([ids, routing[2][:9]]), tokens) == "padding"


def test_rows_from_a_start_that_was_asked_for(ids, tokens):
    found, _ = check(ids[20:], tokens, start=20)
    assert np.array_equal(found, ids[20:])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_that_is_sent_makes_anything_but_an_array_or_a_named_refusal(data):
    shape = data.draw(st.tuples(*[st.integers(0, 6)] * data.draw(st.integers(1, 4))))
    values = st.integers(-2, 10)
    flat = data.draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    routers = Routers(n_experts=4, top_k=2, layers=(0, 2), n_layers=3)
    prompt, generated = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 3)))
    try:
        found = Checker(routers).check(np.array(flat, np.int64).reshape(shape), prompt=prompt, generated=generated)
    except ml.errors.SourceError as error:
        refused = error.argument
    else:
        refused = None
        assert found.shape == (prompt + max(generated - 1, 0), 2, 2)
        assert (found < 4).all()
        assert (found[..., 0] != found[..., 1]).all()
    assert refused in {None, "shape", *FAULTS}
