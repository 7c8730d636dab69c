"""Experts as Linears: the same model as the fused one, to every part that reads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import SHAPES, tiny_mixtral
from torch import nn

import mixlens as ml
from mixlens.models.layout import expert_down, expert_neurons, expert_weights, moe_layers
from mixlens.models.quantization.unfuse import UnfusedExperts, unfuse

IDS = torch.arange(3, 63).reshape(2, 30)


@pytest.fixture(params=list(SHAPES))
def pair(request):
    fused = tiny_mixtral(request.param)
    fused.set_experts_implementation("eager")
    return fused, unfuse(tiny_mixtral(request.param))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_those_of_the_fused_experts(pair, dtype):
    fused, unfused = (model.to(dtype) for model in pair)
    assert torch.equal(unfused(IDS).logits, fused(IDS).logits)


def test_every_expert_matrix_is_a_linear_of_its_own(pair):
    _, unfused = pair
    config = unfused.config
    linears = [m for layer in moe_layers(unfused) for m in layer.experts.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == config.num_hidden_layers * config.num_local_experts * 3
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == len(linears)


@torch.no_grad()
def test_parts_of_experts_are_the_same_in_both_layouts(pair):
    fused, unfused = (moe_layers(model)[1] for model in pair)
    for one, other in zip(expert_weights(fused), expert_weights(unfused), strict=True):
        assert torch.equal(one, other)
    hidden = torch.randn(5, 32)
    neurons = expert_neurons(fused.experts, 3, hidden)
    assert torch.equal(neurons, expert_neurons(unfused.experts, 3, hidden))
    assert torch.equal(expert_down(fused.experts, 3, neurons), expert_down(unfused.experts, 3, neurons))


@torch.no_grad()
def test_a_recorder_sees_the_same_and_changes_nothing(pair):
    fused, unfused = pair
    bare, traces = unfused(IDS).logits, []
    signals = ["router_logits", "expert_out", "expert_neurons"]
    for model in (fused, unfused):
        with ml.Recorder(model, signals=signals, lengths=[30, 30]) as recorder:
            logits = model(IDS).logits
        traces.append(recorder.trace())
    assert torch.equal(logits, bare)
    first, second = traces
    np.testing.assert_array_equal(first.read("expert_id"), second.read("expert_id"))
    for site in ("expert_out", "expert_neurons"):
        np.testing.assert_array_equal(first.activations(site).values, second.activations(site).values)


@torch.no_grad()
def test_edits_do_the_same_in_both_layouts(pair):
    values = torch.linspace(-1, 1, 64)
    for edit in (ml.edits.ablate(1, 3), ml.edits.patch("expert_neurons", values, layer=1, expert=2)):
        logits = []
        for model in pair:
            with ml.edit(model, edit):
                logits.append(model(IDS, attention_mask=torch.ones_like(IDS)).logits)
        assert torch.equal(*logits)
        assert not torch.equal(logits[0], pair[0](IDS).logits)


@torch.no_grad()
def test_it_is_saved_as_the_checkpoint_it_came_from(pair, tmp_path):
    fused, unfused = pair
    unfused.save_pretrained(tmp_path)
    again = ml.load(tmp_path, device_map="cpu", experts="eager", verbose=False)
    assert not isinstance(moe_layers(again)[0].experts, UnfusedExperts)
    assert torch.equal(again(IDS).logits, fused(IDS).logits)


def test_unfusing_twice_is_unfusing_once(pair):
    _, unfused = pair
    experts = moe_layers(unfused)[0].experts
    assert moe_layers(unfuse(unfused))[0].experts is experts
