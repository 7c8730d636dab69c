"""Distinct experts against every batch written out, and their intervals against every document left out by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from helpers.traces import made, made_traces
from hypothesis import assume, given
from hypothesis import strategies as st

import mixlens as ml
from mixlens.core.intervals import Smooth, with_bounds
from mixlens.decisions.verdict import DECISION


def windows_of(case, size: int, documents) -> list[list[list[int]]]:
    """[sequence][step] the tokens of its windows, of sequences of these documents."""
    found = []
    for number, name in enumerate(case.sequences["document_id"]):
        tokens = np.flatnonzero(case.sequence == number).tolist()
        cut = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        if name in documents and cut:
            found.append(cut)
    return found


def by_hand(case, layer: int, batch: int, size: int, documents) -> float:
    """The mean over all batches, each stepped through until its shortest sequence ends."""
    counts = []
    for rows in combinations(windows_of(case, size, documents), batch):
        for step in range(min(map(len, rows))):
            tokens = [token for row in rows for token in row[step]]
            counts.append(len({int(e) for token in tokens for e in case.expert_id[token, layer]}))
    return float(np.mean(counts)) if counts else np.nan


@given(made_traces(min_sequences=3, max_length=7), st.integers(1, 3), st.integers(1, 3))
def test_every_batch_written_out(case, batch, size):
    documents = set(case.sequences["document_id"])
    assume(batch * size > 1 and len(windows_of(case, size, documents)) >= batch)
    found = ml.decisions.distinct_experts(case.trace, batch=batch, window=size)
    expected = [by_hand(case, layer, batch, size, documents) for layer in range(len(case.layers))]
    np.testing.assert_allclose(found["estimate"], expected, rtol=1e-9)
    assert found["layer"].values.tolist() == list(case.layers)


def test_its_interval_leaves_out_each_document():
    case = made([9, 8, 7, 9, 6, 8], documents=["a", "b", "c", "b", "d", "e"], layers=(0, 3))
    found = ml.decisions.distinct_experts(case.trace, batch=2, window=2)
    documents = list(dict.fromkeys(case.sequences["document_id"]))
    sizes = [sum(len(cut) for cut in windows_of(case, 2, {name})) for name in documents]
    for layer in range(2):
        without = [by_hand(case, layer, 2, 2, {*documents} - {name}) for name in documents]
        values = np.array([by_hand(case, layer, 2, 2, documents), *without])
        _, low, high = with_bounds(Smooth(values, floor=2.0), np.array(sizes, float), DECISION.level)
        assert float(found["ci_low"][layer]) == pytest.approx(float(low))
        assert float(found["ci_high"][layer]) == pytest.approx(float(high))


def test_windows_do_not_reach_across_a_gap():
    case = made([6, 5], layers=(0,))
    gap = case.trace.select(tokens=[t for t in range(20) if t != int(case.token_id[2])])
    position = gap.read("position")
    runs = np.split(np.arange(gap.n_tokens), np.flatnonzero(np.diff(position) != 1) + 1)
    assert int(ml.decisions.distinct_experts(gap, window=2)["n"]) == sum(len(run) // 2 for run in runs)


@pytest.mark.parametrize(
    ("asked", "argument"),
    [({"batch": 6}, "batch"), ({"window": 0}, "window"), ({}, "batch"), ({"batch": 1.5}, "batch")],
)
def test_steps_that_cannot_be_are_refused(asked, argument):
    with pytest.raises(ml.BadInput) as refused:
        ml.decisions.distinct_experts(made([6, 5, 7]).trace, **asked)
    assert refused.value.argument == argument


def test_one_document_is_not_enough():
    found = ml.decisions.distinct_experts(made([40, 40], documents=["a", "a"]).trace, window=4)
    assert found["ci_low"].isnull().all()
    assert found.attrs["verdict"] == "not enough evidence"
