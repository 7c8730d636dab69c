"""The compiled decode against the model as it is, its parts against what they stand for, and the choice between."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_mixtral
from transformers import StaticCache

import mixlens as ml
from mixlens.models import decoding
from mixlens.models.decoding import COMPILING_S, Choice, compile_config, one_graph
from mixlens.models.quantization.stack import Stack

SCHEMES = (None, "int8wo", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("nf4", "hqq4-g32")))


@pytest.fixture
def uncompiled(monkeypatch):
    """Graphs run as they were traced: what inductor does with them takes half a minute, and is tried once below."""
    monkeypatch.setattr(decoding, "_backend", lambda graph, inputs, **options: graph)
    torch.compiler.reset()


def loaded(scheme, folder):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}
    model = tiny_mixtral(**sizes)
    if scheme is None:
        return model
    model.save_pretrained(folder)
    return ml.load(folder, quantization=scheme, dtype="float32", verbose=False)


def logits_of(model, compiled=False):
    """Of a prompt and four tokens after it, in a static cache."""
    cache = StaticCache(model.config, max_cache_len=20)

    def step(token):
        return model(input_ids=token, past_key_values=cache).logits[:, -1]

    forward = torch.compile(step, **compile_config().to_dict()) if compiled else step
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        read = model(input_ids=ids, past_key_values=cache).logits[:, -1]
        return torch.stack([read, *[forward(torch.tensor([[token]])).clone() for token in (5, 9, 11, 4)]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_graph_computes_what_the_model_does_and_leaves_it_as_it_was(scheme, tmp_path, uncompiled):
    model = loaded(scheme, tmp_path)
    before, audited, config = logits_of(model), ml.audit(model).summary(), model.config.to_dict()
    modules = [(name, type(module), type(module).forward) for name, module in model.named_modules()]
    with one_graph(model):
        fast = logits_of(model, compiled=True)
        assert all(layer.mlp.experts.is_stacked for layer in model.model.layers if scheme)
    torch.testing.assert_close(fast, before, atol=2e-4, rtol=2e-4)
    assert [(name, type(module), type(module).forward) for name, module in model.named_modules()] == modules
    assert (ml.audit(model).summary(), model.config.to_dict()) == (audited, config)
    assert torch.equal(logits_of(model), before)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_recording_on_and_off_gives_the_same_bits_and_what_an_eager_recorder_sees(tmp_path):
    model = loaded(None, tmp_path)
    with ml.Recorder(model, signals=(), lengths=[9]) as eager:
        truth = logits_of(model)
    with one_graph(model), ml.CompiledRecorder(model, tokens=32, signals=(), lengths=[9]) as recorder:
        on = logits_of(model, compiled=True)
        trace = recorder.trace()
        recorder.clear()
        recorder.paused = True
        off = logits_of(model, compiled=True)
    assert torch.equal(on, off)
    torch.testing.assert_close(on, truth, atol=2e-4, rtol=2e-4)
    assert trace.read("token_id").tolist() == eager.trace().read("token_id").tolist()
    assert trace.read("expert_id").tolist() == eager.trace().read("expert_id").tolist()


@pytest.mark.slow
def test_generate_decodes_through_it(tmp_path):
    model = loaded(None, tmp_path)
    ids = torch.arange(5, 14)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(ids, pad_token_id=0, **options)
    with ml.compiled_decoding(model) as fast:
        assert torch.equal(fast.generate(ids, pad_token_id=0, **options), plain)
    assert model.generation_config.compile_config is None


def test_products_with_one_row_are_sums_in_float32():
    left, right = torch.randn(1, 7, dtype=torch.bfloat16), torch.randn(7, 5, dtype=torch.bfloat16)
    torch.testing.assert_close(decoding._mm(left, right), left @ right, atol=0.02, rtol=0.02)
    many, vectors = torch.randn(3, 5, 7), torch.randn(3, 7, 1)
    torch.testing.assert_close(decoding._bmm(many, vectors), many @ vectors)
    assert decoding._mm(torch.randn(2, 7), torch.randn(7, 5)) is NotImplemented
    assert decoding._bmm(many, torch.randn(3, 7, 2)) is NotImplemented


def test_two_maxima_are_the_two_largest_and_never_one_twice():
    x = torch.randint(0, 4, (200, 8)).float()  # with many ties
    values, ids = decoding._topk(x, 2)
    assert torch.equal(values, x.topk(2).values)
    assert torch.equal(x.gather(1, ids), values)
    assert (ids[:, 0] != ids[:, 1]).all()
    assert decoding._topk(x, 3) is NotImplemented


def test_linears_of_different_widths_or_unknown_kinds_have_no_stack():
    assert Stack.of([torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)]) is None
    assert Stack.of([torch.nn.Identity()]) is None


def test_a_stack_holds_no_byte_twice():
    linears = [torch.nn.Linear(4, 3, bias=False) for _ in range(3)]
    weights = [linear.weight.detach().clone() for linear in linears]
    stack = Stack.of(linears)
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    stack.take_apart()
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 3
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears, weights, strict=True))


@pytest.mark.parametrize(
    ("choice", "compiled", "worth"),
    [
        (Choice(None), False, False),
        (Choice(0.04, left_s=COMPILING_S), False, False),
        (Choice(0.04, left_s=COMPILING_S + 1), False, True),
        (Choice(0.04, left_s=200, compiled_step_s=0.01, compile_s=30), True, True),
        (Choice(0.04, left_s=200, compiled_step_s=0.05, compile_s=30), False, True),
        (Choice(0.04, left_s=200, fault="InductorError: no compiler"), False, True),
    ],
)
def test_what_is_faster_is_chosen(choice, compiled, worth):
    assert (choice.compiled, choice.worth_compiling) == (compiled, worth)
