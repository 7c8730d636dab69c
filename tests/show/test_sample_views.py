"""The view of an evaluation's samples has, of each sample, the routing of the row that stands for it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.displayed import Page
from test_views import log_of
from unpacking import unpack

import mixlens as ml
from mixlens.evals.log import Log

CHOICES = ["wrong", "gold", "wrong", "wrong"]
COUNTED = [choice == "gold" for choice in CHOICES]


def numbered(log: Log, first: int) -> Log:
    """The same with samples numbered from `first`, so that no number is a place."""
    return Log([record | {"sample_id": first + i} for i, record in enumerate(log.records)], log.meta)


def rows_of(*samples: int, length: int = 3, tasks: tuple[str, ...] = ("quiz",)) -> tuple[ml.Trace, np.ndarray]:
    """Four rows a sample, one of which counts, each with experts of its own; layers 1 and 3 of 4 are kept."""
    keys = [(task, n, counted) for task in tasks for n in samples for counted in COUNTED]
    frame = pd.DataFrame(keys, columns=["task", "sample_id", "counted"])
    frame.insert(0, "document_id", [f"{task}/{n}" for task, n, _ in keys])
    sequence = np.repeat(np.arange(len(keys)), length)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (len(sequence), 4, 1)), axis=-1)[..., :2]
    whole = ml.Trace.from_arrays(ids, n_experts=8, tokens={"sequence": sequence}, sequences=frame)
    return whole.select(layers=[1, 3]), ids


def pairs(arrays: dict, header: dict, place: int) -> np.ndarray:
    """Experts [token, layer, slot] of one sequence of a view."""
    start, stop = header["starts"][place : place + 2]
    found = arrays["pair"][:, start:stop].T.astype(int)
    return np.stack([found // 8, found % 8], -1)


def test_of_four_rows_of_a_sample_the_one_that_counts_is_shown():
    trace, ids = rows_of(9, 7, 8)
    header, arrays = unpack(ml.view.samples(numbered(log_of(4), 7), trace).packed)
    assert header["sample_sequence"] == [2, 0, 1]
    assert header["layers"] == [1, 3]
    assert header["layer"] == 1  # a place among the layers shown
    for place in range(3):
        row = 4 * place + COUNTED.index(True)
        np.testing.assert_array_equal(pairs(arrays, header, place), ids[3 * row : 3 * row + 3, [1, 3]])
    log = numbered(log_of(4), 7)
    log.routing = trace
    assert unpack(ml.view.samples(log).packed)[1]["pair"].tolist() == arrays["pair"].tolist()


def test_where_no_row_is_said_to_count_all_are_of_the_sample():
    trace, ids = rows_of(1)
    frame = trace.sequences.drop(columns="counted")
    header, arrays = unpack(
        ml.view.samples(log_of(2), ml.Trace(trace._sources, frame, trace.meta, trace.layers)).packed
    )
    assert header["sample_sequence"] == [1] * 4
    np.testing.assert_array_equal(pairs(arrays, header, 2), ids[6:9, [1, 3]])


def test_samples_of_other_tasks_and_those_cut_off_have_no_routing_here():
    trace, ids = rows_of(0, 5, 1, tasks=("other", "quiz"))
    header, arrays = unpack(ml.view.samples(log_of(6), trace, most=2).packed)
    assert header["sample_sequence"] == [0, 1]
    np.testing.assert_array_equal(pairs(arrays, header, 1), ids[3 * 21 : 3 * 21 + 3, [1, 3]])
    assert len(header["rows"]) == 2


@pytest.mark.parametrize("most", [3, 10, 11])
def test_the_rows_are_those_of_the_log_and_what_is_cut_and_not_scored_is_counted(most):
    log = log_of(10)  # 4 wrong, 3 right, 3 not scored
    made = ml.view.samples(log, most=most)
    header, _ = unpack(made.packed)
    kept = log.records[:most]
    for shown, record in zip(header["rows"], kept, strict=True):
        assert shown == {name: record[name] for name in shown}
        assert shown.keys() >= {"task", "sample_id", "prompt", "response", "target", "choices", "logprobs", "correct"}
    numbers = [int(n) for n in header["note"].replace(",", " ").replace(".", " ").split() if n.isdigit()]
    assert numbers == [10, 1, 3, *([most] if most < 10 else [])]
    head, *rows = Page(made.static).tables[0]
    assert rows == [["–" if record[name] is None else str(record[name]) for name in head] for record in kept[:8]]


def test_long_texts_are_cut_and_told_how_long_they_were():
    header, _ = unpack(ml.view.samples(log_of(1, "x" * 20_001)).packed)
    text = header["rows"][0]["prompt"]
    assert text.startswith("x" * 20_000 + "…")
    assert "20,001" in text
    assert unpack(ml.view.samples(log_of(1, "x" * 20_000)).packed)[0]["rows"][0]["prompt"] == "x" * 20_000
