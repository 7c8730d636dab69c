"""Saliency against loops over the outputs of experts, and against llm-compressor's own REAP modifier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mixlens as ml
from mixlens.errors import BadInput, MissingSignal

QUIET = ml.RecordSettings(progress=False)
REAP = json.loads(Path(__file__).with_name("reap_of_llmcompressor.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


@pytest.fixture(scope="module")
def read_by_reap() -> list[dict]:
    by_id = {document["id"]: document for document in ml.demo_documents()}
    return [by_id[name] for name in REAP["documents"]]


@pytest.fixture(scope="module")
def trace(demo, read_by_reap):
    signals = [ml.Site("expert_norm", dtype="float32"), ml.Site("expert_out", dtype="float32", layers=[2])]
    return ml.record(demo, read_by_reap, signals=signals, settings=QUIET)


def test_reap_is_that_of_llmcompressor(demo, read_by_reap, trace):
    wanted = np.array(REAP["saliency"])
    outputs = ml.experiments.expert_outputs(demo, read_by_reap, settings=QUIET)
    assert trace.n_tokens == REAP["tokens"]
    np.testing.assert_allclose(outputs["weighted_norm"].values, wanted, rtol=1e-5)
    recorded = ml.stats.saliency(trace)["estimate"].sel(measure="reap")
    np.testing.assert_allclose(recorded.values, wanted, rtol=2**-11)  # weights are kept in half precision
    kept = ml.decisions.strongest(recorded, 6)
    assert [np.flatnonzero(row).tolist() for row in kept.values] == REAP["retained"]


def test_each_measure_is_that_of_loops(trace):
    data = ml.stats.saliency(trace).sel(layer=2)
    ids, weights = trace.read("expert_id")[:, 2], trace.read("weight")[:, 2]
    outputs = trace.activations("expert_out").sel(layer=2).values
    chosen, norm, weighted = np.zeros((3, 8))
    for token in range(len(ids)):
        for slot, expert in enumerate(ids[token]):
            size = float(np.sqrt(sum(float(x) ** 2 for x in outputs[token, slot])))
            chosen[expert] += 1
            norm[expert] += size
            weighted[expert] += size * float(weights[token, slot])
    np.testing.assert_array_equal(data["n"].values, chosen)
    for measure, wanted in (("frequency", chosen / chosen.sum()), ("norm", norm / chosen), ("reap", weighted / chosen)):
        cell = data.sel(measure=measure)
        np.testing.assert_allclose(cell["estimate"].values, wanted, rtol=1e-6)
        assert (cell["ci_low"] <= cell["estimate"]).all()
        assert (cell["ci_high"] >= cell["estimate"]).all()
    assert data.sel(measure="loss")["estimate"].isnull().all()


def test_the_measured_loss_stands_beside(demo, read_by_reap, trace):
    ablation = ml.experiments.Ablation(layers=[0])
    short = [document["text"][:200] for document in read_by_reap[:2]]
    measured = ml.experiments.measure_importance(demo, short, ablation=ablation, settings=QUIET)
    data = ml.stats.saliency(trace.select(layers=[0]), importance=measured)
    wanted = ml.stats.expert_importance(measured)
    np.testing.assert_array_equal(data["estimate"].sel(measure="loss").values, wanted["estimate"].values)
    with pytest.raises(BadInput):
        ml.stats.saliency(trace, importance=measured)


def test_a_trace_without_norms_is_refused(demo, read_by_reap):
    with pytest.raises(MissingSignal):
        ml.stats.saliency(ml.record(demo, read_by_reap[:1], settings=QUIET))
    some = ml.record(demo, read_by_reap[:1], signals=[ml.Site("expert_norm", layers=[0])], settings=QUIET)
    with pytest.raises(MissingSignal):
        ml.stats.saliency(some)
