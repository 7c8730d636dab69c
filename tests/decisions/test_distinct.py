"""Distinct experts against every batch written out, and their intervals against every document left out by hand."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from helpers.traces import made, made_traces
from hypothesis import assume, given
from hypothesis import strategies as st

import mixlens as ml
from mixlens.bench.bytes_and_flops import Work
from mixlens.bench.model_prompts import Prompts
from mixlens.bench.roofline import Machine, roofline
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
    [({"batch": 6}, "batch"), ({"window": 0}, "window"), ({"batch": 1.5}, "batch")],
)
def test_steps_that_cannot_be_are_refused(asked, argument):
    with pytest.raises(ml.BadInput) as refused:
        ml.decisions.distinct_experts(made([6, 5, 7]).trace, **asked)
    assert refused.value.argument == argument


def test_one_document_is_not_enough():
    found = ml.decisions.distinct_experts(made([40, 40], documents=["a", "a"]).trace, window=4)
    assert found["ci_low"].isnull().all()
    assert found.attrs["verdict"] == "not enough evidence"


def test_one_token_reads_its_own_experts_and_decides_nothing():
    found = ml.decisions.distinct_experts(made([9, 8, 7]).trace)
    assert found["estimate"].values.tolist() == [2, 2, 2]
    assert (found.attrs["formula"], found.attrs["verdict"]) == (2, "not enough evidence")


def test_bytes_of_a_step_are_those_that_a_benchmark_counts():
    model = ml.load("demo", verbose=False)
    case = made([6] * 4, layers=range(8), documents=[*"abcd"])
    found = ml.decisions.decode_time(case.trace, model, batch=2, context=10, bandwidth_bytes_per_s=1e9, step_s=0.5).sel(
        quantity=["read_bytes", "decode_s", "tokens_per_s", "mbu_frac"]
    )
    work = Work(model)
    cached = 2 * work.cached_bytes(10)
    pairs = combinations(range(0, 24, 6), 2)
    by_step = [work.weights.read(case.expert_id[[a + at, b + at]])[0] + cached for a, b in pairs for at in range(6)]
    mean = float(np.mean(by_step))
    np.testing.assert_allclose(found["estimate"], [mean, mean / 1e9, 2e9 / mean, mean / 5e8])
    assert (found["ci_low"] <= found["estimate"]).all()
    assert (found["estimate"] <= found["ci_high"]).all()
    for trace, bandwidth, argument in ((case.trace.select(layers=[0, 1]), 1e9, "trace"), (case.trace, -1, "bandwidth")):
        with pytest.raises(ml.BadInput) as refused:
            ml.decisions.decode_time(trace, model, context=1, bandwidth_bytes_per_s=bandwidth)
        assert str(refused.value.argument).startswith(argument)


@pytest.mark.slow
def test_a_trace_of_other_prompts_predicts_the_count_of_a_run():
    model = ml.load("demo", verbose=False)
    quiet = ml.bench.LocalSettings(progress=False)
    sizes = {"prompt_tokens": 48, "output_tokens": 40}
    bench = ml.benchmark(model, concurrency=4, requests=6, workload=ml.bench.Workload(**sizes), settings=quiet)
    machine = Machine.of(bench.meta["machine"])
    run = roofline(bench.records, machine, layers=8).query("phase == 'decode'").set_index("metric")["estimate"]
    ids, mask = Prompts(model, ml.bench.Workload(**sizes, seed=7)).batch(list(range(24)))
    with ml.Recorder(model) as recorder:
        model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    found = ml.decisions.decode_time(
        recorder.trace().select(phase="generated"),
        model,
        batch=4,
        context=48 + 20,
        bandwidth_bytes_per_s=machine.bandwidth_bytes_per_s.estimate,
        step_s=float(run["forward_s"]),
    )["estimate"]
    assert float(found.sel(quantity="read_bytes")) == pytest.approx(float(run["read_bytes"]), rel=0.03)
    assert float(found.sel(quantity="mbu_frac")) == pytest.approx(float(run["mbu_frac"]), rel=0.03)


def test_the_layers_that_read_most_experts_stay_on_the_gpu():
    found = ml.decisions.distinct_experts(made([40, 30, 35], layers=(1, 4, 10), seed=6).trace, window=4)
    [pattern, buffer] = ml.decisions.tensor_overrides(found, on_gpu=1).split("=")
    busiest = int(found["layer"][found["estimate"].values.argmax()])
    on_cpu = {n for n in range(12) for part in ("gate", "up", "down")
              if re.search(pattern, f"blk.{n}.ffn_{part}_exps.weight")}  # fmt: skip
    assert (on_cpu, buffer) == ({1, 4, 10} - {busiest}, "CPU")
    assert not re.search(pattern, "blk.4.ffn_gate_inp.weight")
    for what, argument in ((found.drop_attrs(), "found"), (found, "on_gpu")):
        with pytest.raises(ml.BadInput) as refused:
            ml.decisions.tensor_overrides(what, on_gpu=4)
        assert refused.value.argument == argument
