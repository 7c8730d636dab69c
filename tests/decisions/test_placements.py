"""Placements against EPLB's published example, every placement tried, and loads counted token by token."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
from helpers.traces import made
from hypothesis import given
from hypothesis import strategies as st

import mixlens as ml
from mixlens.stats.expert_balance import eplb

NAMES = [f"d{i}" for i in range(8)]


def test_the_published_example_of_eplb():
    """README of github.com/deepseek-ai/EPLB: 2 layers of 12 experts, 4 copies, 4 groups, 2 nodes, 8 devices."""
    load = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    assert [eplb(row, 8, 4, 2, 4).tolist() for row in load.astype(float)] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@given(st.lists(st.integers(0, 50), min_size=6, max_size=6))
def test_two_experts_a_device_are_packed_as_well_as_can_be(loads):
    load = np.array(loads, float)
    best = min(max(load[list(order[i : i + 2])].sum() for i in (0, 2, 4)) for order in permutations(range(6)))
    assert load[eplb(load, 3, 0)].reshape(3, 2).sum(-1).max() == best


@given(st.integers(0, 2**16), st.sampled_from([(4, 0, 1, 1), (4, 4, 2, 1), (4, 4, 2, 4), (2, 2, 2, 2), (8, 8, 4, 8)]))
def test_every_expert_has_a_place_and_devices_have_as_many(seed, asked):
    ranks, redundant, nodes, groups = asked
    load = np.random.default_rng(seed).integers(0, 100, 8).astype(float)
    physical = eplb(load, ranks, redundant, nodes, groups)
    assert len(physical) == 8 + redundant
    assert set(physical.tolist()) == set(range(8))


def busiest(case, layer, documents, step, shares) -> tuple[float, float]:
    """Sums over steps of the largest and of the mean load of a device; `shares` {expert: {device: part}}."""
    devices = sorted({device for of in shares.values() for device in of})
    most = mean = 0.0
    for number, name in enumerate(case.sequences["document_id"]):
        tokens = case.expert_id[case.sequence == number, layer].tolist()
        for at in range(0, len(tokens) if name in documents else 0, step):
            load = dict.fromkeys(devices, 0.0)
            for experts in tokens[at : at + step]:
                for e in experts:
                    for device, part in shares[e].items():
                        load[device] += part
            most, mean = most + max(load.values()), mean + sum(load.values()) / len(devices)
    return most, mean


@pytest.mark.parametrize("redundant", [0, 4])
def test_loads_counted_token_by_token(redundant):
    case = made([30, 17, 40, 22, 9, 31, 25, 18], layers=(1, 3), documents=NAMES, seed=4)
    found = ml.decisions.placement(case.trace, ranks=4, redundant=redundant, step=8)
    fits = set(np.random.default_rng(0).permutation(NAMES)[:4])
    top, bottom = np.zeros(2)
    tops = []
    for layer in range(2):
        load = np.bincount(case.expert_id[np.isin(case.of_tokens("document_id"), [*fits]), layer].ravel(), minlength=8)
        assert found["load"].values[layer].tolist() == load.tolist()
        physical = found["physical"].values[layer].tolist()
        assert physical == eplb(load.astype(float), 4, redundant).tolist()
        each = len(physical) // 4
        shares = {e: {} for e in range(8)}
        for place, e in enumerate(physical):
            shares[e][place // each] = shares[e].get(place // each, 0) + 1 / physical.count(e)
        most, mean = busiest(case, layer, {*NAMES} - fits, 8, shares)
        assert float(found["by_layer"].sel(placement="eplb")[layer]) == pytest.approx(most / mean)
        top, bottom = top + most, bottom + mean
        tops.append(busiest(case, layer, {*NAMES} - fits, 8, {e: {e // 2: 1.0} for e in range(8)})[0])
    assert float(found["estimate"].sel(placement="eplb")) == pytest.approx(top / bottom)
    assert float(found["estimate"].sel(placement="contiguous")) == pytest.approx(sum(tops) / bottom)
    if not redundant:
        assert found.attrs["gain"] == pytest.approx((sum(tops) - top) / bottom)


def test_regret_is_against_every_placement_tried():
    case = made([30] * 8, layers=(0,), documents=NAMES, seed=9)
    found = ml.decisions.placement(case.trace, ranks=4, step=8)
    judges = {*NAMES} - set(np.random.default_rng(0).permutation(NAMES)[:4])
    best = np.inf
    for order in permutations(range(8)):
        if all(order[i] < order[i + 1] for i in (0, 2, 4, 6)) and list(order[::2]) == sorted(order[::2]):
            most, mean = busiest(case, 0, judges, 8, {e: {place // 2: 1.0} for place, e in enumerate(order)})
            best = min(best, most / mean)
    for name in found["placement"].values:
        regret = float(found["regret"].sel(placement=name))
        assert regret == pytest.approx(float(found["estimate"].sel(placement=name)) - best)
        assert regret >= -1e-12


def test_traffic_between_nodes():
    case = made([30] * 8, layers=(0, 1, 2), documents=NAMES, seed=1)
    found = ml.decisions.placement(case.trace, ranks=4, nodes=2, hidden_bytes=100)
    judges = {*NAMES} - set(np.random.default_rng(0).permutation(NAMES)[:4])
    remote = moves = n = 0
    for at in np.flatnonzero(np.isin(case.of_tokens("document_id"), [*judges])):
        n += 1
        node = case.expert_id[at] // 4
        remote += sum(len({*row.tolist()} - {home}) for row in node for home in (0, 1)) / 2
        moves += int((node[1:, 0] != node[:-1, 0]).sum())
    row = found.sel(placement="contiguous")
    assert float(row["remote"]) == pytest.approx(remote / n)
    assert float(row["moves"]) == pytest.approx(moves / n)
    assert float(row["bytes_per_token"]) == pytest.approx(200 * remote / n)


def test_what_engines_load(tmp_path):
    case = made([30] * 8, layers=(1, 3), documents=NAMES)
    found = ml.decisions.placement(case.trace, ranks=4, redundant=4)
    physical = found["physical"].values
    sglang = json.loads(ml.decisions.save_placement(found, tmp_path / "a.json").read_text())["physical_to_logical_map"]
    assert np.array(sglang).shape == (4, 12)
    assert [sglang[1], sglang[3]] == physical.tolist()
    assert all(set(row) == set(range(8)) for row in sglang)
    ascend = json.loads(ml.decisions.save_placement(found, tmp_path / "b.json", engine="vllm-ascend").read_text())
    assert ascend["moe_layer_count"] == len(ascend["layer_list"]) == 2
    for layer, row in zip(ascend["layer_list"], physical, strict=True):
        assert layer["device_count"] == 4
        assert [e for device in layer["device_list"] for e in device["device_expert"]] == row.tolist()


@pytest.mark.parametrize(
    ("asked", "argument"),
    [
        ({"ranks": 3}, "ranks"),
        ({"ranks": 4, "redundant": 3}, "ranks"),
        ({"ranks": 4, "nodes": 3}, "nodes"),
        ({"ranks": 4, "groups": 3}, "groups"),
        ({"ranks": 4, "step": 0}, "step"),
        ({"ranks": 1, "redundant": 1, "nodes": 1, "groups": 0}, "groups"),
    ],
)
def test_placements_that_cannot_be_are_refused(asked, argument):
    with pytest.raises(ml.BadInput) as refused:
        ml.decisions.placement(made().trace, **asked)
    assert refused.value.argument == argument


def test_only_a_placement_is_saved(tmp_path):
    found = ml.decisions.placement(made([20, 20]).trace, ranks=2)
    for what, engine, argument in ((3, "sglang", "found"), (found, "tgi", "engine")):
        with pytest.raises(ml.BadInput) as refused:
            ml.decisions.save_placement(what, tmp_path / "a.json", engine=engine)
        assert refused.value.argument == argument
