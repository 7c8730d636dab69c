"""The CompiledRecorder against a Recorder round the same forwards, under torch.compile with a static cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from tiny import tiny_mixtral
from transformers import CompileConfig, StaticCache

from mixlens import BadInput, CompiledRecorder, Recorder, RecordingError

COLUMNS = ("token_id", "position", "phase", "expert_id", "weight", "router_logits")


@pytest.fixture
def model():
    torch.compiler.reset()
    model = tiny_mixtral(num_hidden_layers=2)
    model.set_experts_implementation("batched_mm")
    return model


def prompt(rows: int = 2, columns: int = 7) -> torch.Tensor:
    return torch.randint(3, 128, (rows, columns), generator=torch.Generator().manual_seed(0))


def decode(model, forward, ids, steps=6):
    """Logits of a greedy decode in a static cache, whose prompt is read by the model itself."""
    cache = StaticCache(model.config, max_cache_len=32)
    logits = [model(input_ids=ids, past_key_values=cache).logits[:, -1]]
    for _ in range(steps):
        token = logits[-1].argmax(-1)[:, None]
        logits.append(forward(input_ids=token, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


def assert_same(trace, expected, exactly=True):
    assert trace.sequences["length"].tolist() == expected.sequences["length"].tolist()
    for name in COLUMNS:
        if exactly or trace.read(name).dtype.kind != "f":
            np.testing.assert_array_equal(trace.read(name), expected.read(name), err_msg=name)
        else:
            np.testing.assert_allclose(trace.read(name), expected.read(name), atol=2e-3, err_msg=name)


@torch.no_grad()
def test_a_compiled_decode_records_what_an_eager_one_does(model):
    ids, lengths = prompt(), [7, 7]
    with Recorder(model, signals=("router_logits",), lengths=lengths) as eager:
        expected = decode(model, model.forward, ids)
    with CompiledRecorder(model, tokens=26, lengths=lengths) as recorder:
        logits = decode(model, torch.compile(model.forward, fullgraph=True, backend="eager"), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert_same(recorder.trace(), eager.trace(), exactly=False)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@torch.no_grad()
def test_inductor_leaves_outputs_as_they_are_and_ids_equal(model, experts):
    model.set_experts_implementation(experts)
    ids, lengths = prompt(), [7, 7]
    bare = decode(model, torch.compile(model.forward, fullgraph=True), ids)
    with Recorder(model, signals=("router_logits",), lengths=lengths) as eager:
        decode(model, model.forward, ids)
    with CompiledRecorder(model, tokens=26, lengths=lengths) as recorder:
        recorded = decode(model, torch.compile(model.forward, fullgraph=True), ids)
    assert torch.equal(bare, recorded)
    assert_same(recorder.trace(), eager.trace(), exactly=False)


@pytest.mark.slow
@torch.no_grad()
def test_code_compiled_earlier_records_inside_alone(model):
    ids, forward = prompt(1), torch.compile(model.forward, fullgraph=True, backend="eager")
    bare = decode(model, forward, ids)
    with CompiledRecorder(model, tokens=13) as recorder:
        inside = decode(model, forward, ids)
        recorder.paused = True
        decode(model, forward, ids)
    after = decode(model, forward, ids)
    assert torch.equal(bare, inside)
    assert torch.equal(bare, after)
    assert recorder.trace().n_tokens == 13


@torch.no_grad()
def test_pausing_runs_the_same_graph_and_the_same_tokens(model):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    ids, lengths = prompt(), [7, 7]
    with CompiledRecorder(model, tokens=26, lengths=lengths) as recorder:
        forward = torch.compile(model.forward, fullgraph=True, backend=backend)
        recorded = decode(model, forward, ids)
        made = len(graphs)
        recorder.paused = True
        assert torch.equal(decode(model, forward, ids), recorded)
        recorder.clear()
        decode(model, forward, ids)
        assert len(graphs) == made
        recorder.paused = False
        decode(model, forward, ids)
        assert recorder.trace().n_tokens == 26
    with CompiledRecorder(model, tokens=26, lengths=lengths) as whole:
        decode(model, model.forward, ids)
    assert_same(recorder.trace(), whole.trace(), exactly=False)


def test_a_compiled_generate_with_padding_and_ends_records_what_an_eager_one_does(model):
    ids = prompt(3, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, :4] = 0
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": list(range(40))}
    with Recorder(model, signals=("router_logits",)) as eager:
        expected = [model.generate(ids, **options), model.generate(ids[:1], max_new_tokens=3)]
    with CompiledRecorder(model, tokens=60) as recorder:  # room for one generate at a time
        static = {"cache_implementation": "static", "compile_config": compiled}
        got = [model.generate(ids, **options, **static), model.generate(ids[:1], max_new_tokens=3, **static)]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert len(set(recorder.trace().sequences["length"])) > 2
    assert_same(recorder.trace(), eager.trace(), exactly=False)


@torch.no_grad()
def test_eager_forwards_are_recorded_bit_for_bit(model):
    batch = {"input_ids": prompt(2, 6), "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    with Recorder(model, signals=("router_logits",)) as eager, CompiledRecorder(model, tokens=40) as recorder:
        model(**batch)
        model(input_ids=prompt(1, 9))
        assert recorder.trace().n_tokens == 6 + 4 + 9
        model(input_ids=prompt(1, 3))
    assert_same(recorder.trace(), eager.trace())


@torch.no_grad()
def test_more_tokens_than_there_is_room_for(model):
    recorder = CompiledRecorder(model, tokens=8)
    with refused(BadInput, "tokens", 9), recorder:
        model(input_ids=prompt(1, 9))
    assert not model.model._forward_hooks
    assert not model.model.layers[0].mlp.gate._forward_hooks


@torch.no_grad()
def test_rows_that_nothing_tells_the_padding_of(model):
    with (
        refused(RecordingError, "attention_mask", 2),
        CompiledRecorder(model, tokens=99),
    ):
        model(input_ids=prompt(2, 4))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"tokens": 0}, ("tokens", 0)), ({"tokens": 5, "signals": ("logprob",)}, ("signals", ["logprob"]))],
)
def test_what_it_cannot_keep(options, named):
    with refused(BadInput, *named):
        CompiledRecorder(tiny_mixtral(), **options)
