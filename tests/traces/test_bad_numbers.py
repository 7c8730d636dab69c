"""Numbers that nobody asked for: each is kept right, or refused by name at the door."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.refusals import refused

import mixlens as ml

IDS = np.array([[[0, 2], [1, 3]], [[3, 1], [0, 1]], [[2, 0], [3, 2]]])
WEIGHT = np.full(IDS.shape, 0.5, np.float32)
LOGITS = np.zeros((3, 2, 4), np.float32)


def made(**changed: object) -> ml.Trace:
    return ml.Trace.from_arrays(**{"expert_id": IDS, "n_experts": 4, **changed})


def with_one(array: np.ndarray, place: tuple[int, ...], value: object) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"expert_id": with_one(IDS, (1, 1, 0), 1)}, "expert_id"),
        ({"weight": with_one(WEIGHT, (1, 0, 1), np.nan)}, "weight"),
        ({"weight": with_one(WEIGHT, (1, 0, 1), np.inf)}, "weight"),
        ({"weight": with_one(WEIGHT, (1, 0, 1), -0.1)}, "weight"),
        ({"weight": WEIGHT.astype(str)}, "weight"),
        ({"router_logits": with_one(LOGITS, (2, 1, 3), np.nan)}, "router_logits"),
        ({"router_logits": with_one(LOGITS, (2, 1, 3), np.inf)}, "router_logits"),
        ({"tokens": {"token_id": [1, -1, 2]}}, "token_id"),
        ({"tokens": {"token_id": [1, 2**63, 2]}}, "token_id"),
        ({"tokens": {"token_id": [1, 10**30, 2]}}, "token_id"),
        ({"tokens": {"token_id": [1, 1.5, 2]}}, "token_id"),
        ({"tokens": {"token_id": [1, np.nan, 2]}}, "token_id"),
        ({"tokens": {"token_id": ["1", "2", "3"]}}, "token_id"),
        ({"tokens": {"position": [0, -1, 2]}}, "position"),
        ({"tokens": {"phase": [0, 2, 1]}}, "phase"),
        ({"tokens": {"logprob": [-1.0, np.inf, -1.0]}}, "logprob"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(changed, argument):
    with refused(ml.BadInput, argument):
        made(**changed)


def test_large_numbers_are_kept_in_memory_and_on_disk(tmp_path):
    token_id = [2**31 - 1, 2**31, 2**63 - 1]
    logits = with_one(with_one(LOGITS, (0, 0, 0), 1e6), (1, 1, 3), -np.inf)
    trace = made(router_logits=logits, weight=WEIGHT * 2e5, tokens={"token_id": token_id, "logprob": [np.nan, -1, 0]})
    for one in (trace, trace.save(tmp_path / "run")):
        assert one.read("token_id").tolist() == token_id
        assert np.array_equal(one.read("router_logits"), logits)
        assert np.array_equal(one.read("weight"), WEIGHT * 2e5)
        assert np.array_equal(one.read("logprob"), np.array([np.nan, -1, 0], np.float32), equal_nan=True)


def test_ordinary_numbers_are_still_kept_in_half(tmp_path):
    path = made(router_logits=LOGITS, weight=WEIGHT).save(tmp_path / "run").path
    from safetensors.numpy import load_file

    stored = load_file(path / "routing-00000.safetensors")
    assert (stored["router_logits"].dtype, stored["weight"].dtype) == (np.float16, np.float16)
