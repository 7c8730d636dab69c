"""compare: two traces of a model and a rounded copy of it, objects or paths, and what cannot be compared."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens.bench.bench import Bench
from mixlens.errors import BadInput
from mixlens.stats import Bootstrap

SETTINGS = ml.RecordSettings(progress=False, shard_tokens=100)
DOCUMENTS = [
    {"text": f"{word} number {i}, told at" + " some length" * i, "domain": word}
    for i in range(5)
    for word in ("one", "two")
]
SIGNALS = ["router_logits", "logprob", "top_logprobs"]


def rounded(model, bits=4):
    """A copy whose expert weights have 2**bits values a row."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in copied.named_parameters():
            if "experts" in name:
                step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
                weight.copy_((weight / step).round() * step)
    return copied


@pytest.fixture(scope="module")
def traces():
    from tiny import Letters

    model = tiny_mixtral()
    return [
        ml.record(m, DOCUMENTS, tokenizer=Letters(), signals=SIGNALS, settings=SETTINGS)
        for m in (model, rounded(model))
    ]


def test_a_run_agrees_with_itself(traces):
    same = ml.compare(traces[0], traces[0])
    agreement = same.agreement(by="domain").estimate
    assert float(agreement.sel(measure=["top1", "overlap"]).min()) == 1
    assert float(agreement.sel(measure="jensen_shannon").max()) == pytest.approx(0, abs=1e-6)
    assert float(same.flips().estimate.sel(measure="so_far").max()) == 0
    found = same.next_tokens().estimate
    assert float(found.sel(measure="kl_at_least")) == 0
    assert float(found.sel(measure="same_top")) == 1
    assert float(found.sel(measure="loss_difference")) == 0


def test_two_runs_by_object_and_by_path(traces, tmp_path):
    a, b = traces
    found = ml.compare(a, b)
    saved = ml.compare(a.save(tmp_path / "whole").path, b.save(tmp_path / "rounded"))
    assert saved.names == ("whole", "rounded")
    pd.testing.assert_frame_equal(
        saved.overview().reset_index(drop=True), found.overview().reset_index(drop=True), check_exact=False
    )
    changed = found.flips().estimate.sel(measure="changed")
    assert 0 < float(changed.max()) < 1
    assert 0 < float(found.next_tokens().estimate.sel(measure="kl_at_least"))
    assert not found.missing()
    whole = a.n_tokens - len(a.sequences)
    assert int(found.next_tokens().n) == whole
    by_domain = found.next_tokens(by="domain")
    assert int(by_domain.n.sum()) == whole
    for text in (repr(saved), saved._repr_html_()):
        assert "whole" in text
        assert "KL(first || second), at least" in text
        assert f"{a.n_tokens:,} tokens of 10 documents" in text


def test_a_paired_interval_is_narrower_than_that_of_either_loss(traces):
    found = ml.compare(*traces).next_tokens()
    width = (found.ci_high - found.ci_low).sel(measure=["loss_a", "loss_b", "loss_difference"]).values
    assert width[2] < width[:2].min()


def test_a_trace_without_logprobs_is_compared_as_far_as_it_goes(traces, letters):
    model = tiny_mixtral()
    bare = ml.record(model, DOCUMENTS, tokenizer=letters, signals=[], settings=SETTINGS)
    found = ml.compare(bare, traces[1], bootstrap=Bootstrap(replicates=20))
    assert len(found.overview()) == 3
    assert set(found.missing()) == {"part of agreement", "flips_by_margin", "next_tokens"}
    assert "next_tokens needs logprob" in found._repr_html_()


def small(token_id, n_layers=2, vocabulary=None):
    ids = np.zeros((len(token_id), n_layers, 2), int)
    ids[..., 1] = 1
    trace = ml.Trace.from_arrays(ids, n_experts=4, tokens={"token_id": token_id})
    trace._vocabulary = vocabulary
    return trace


def test_what_cannot_be_compared(traces, tmp_path):
    with refused(BadInput, "token_id", {"sequence": (0, 0), "position": (2, 2), "token_id": (7, 9)}):
        ml.compare(small([5, 6, 7]), small([5, 6, 9]))
    with refused(BadInput, "layers", ([0, 1], [0])):
        ml.compare(small([5, 6]), small([5, 6], n_layers=1))
    words, others = pd.Series({5: "a", 6: "b"}), pd.Series({5: "a", 6: "<c>"})
    with refused(BadInput, "tokenizer", (6, "b", "<c>")):
        ml.compare(small([5, 6], vocabulary=words), small([5, 6], vocabulary=others))
    with refused(BadInput, "kind", ("a trace", "a benchmark")):
        ml.compare(traces[0], Bench([], {}))
