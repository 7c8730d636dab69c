"""Modules that run by other ways than through the model, and models that are copied inside a block."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from tiny import tiny_mixtral
from transformers import DynamicCache

import mixlens as ml
from mixlens.errors import BadInput, RecordingError

IDS = torch.tensor([[9, 8, 11, 40, 5, 17]])


@pytest.fixture
def model():
    return tiny_mixtral(num_hidden_layers=2)


def layer_by_layer(model):
    hidden, at = model.model.embed_tokens(IDS), torch.arange(IDS.shape[1])[None]
    for layer in model.model.layers:
        rotary = model.model.rotary_emb(hidden, at)
        hidden = layer(hidden, position_embeddings=rotary, position_ids=at, attention_mask=None)


@pytest.mark.parametrize("run", [layer_by_layer, lambda model: model.model.forward(IDS)])
@pytest.mark.parametrize("then", ["the block ends", "another forward"])
def test_layers_that_run_outside_a_forward_are_named(model, run, then):
    with torch.no_grad(), refused(RecordingError, "layers", [0, 1]), ml.Recorder(model) as recorder:
        model(IDS)
        run(model)
        if then == "another forward":
            model(IDS)
    assert recorder.trace().n_tokens == 6


def test_an_edit_of_some_tokens_of_a_layer_that_runs_alone_is_refused(model):
    forbid = ml.edits.forbid(0, 1, where=ml.edits.Where(positions=[0]))
    with torch.no_grad(), refused(RecordingError, "where", forbid), ml.edit(model, forbid):
        layer_by_layer(model)


def in_parts(block, whole):
    return lambda hidden: torch.cat([whole(hidden[:, :2]), whole(hidden[:, 2:])], 1)


def twice(block, whole):
    return lambda hidden: (block.gate(-hidden.flatten(0, 1)), whole(hidden))[1]


@pytest.mark.parametrize("how", [in_parts, twice])
@pytest.mark.parametrize("reads", ["Recorder", "record"])
def test_a_router_that_runs_several_times_in_a_forward_is_named(model, how, reads):
    block = model.model.layers[1].mlp
    block.forward = how(block, block.forward)
    with torch.no_grad(), refused(RecordingError, "expert_id", [1]):
        if reads == "record":
            ml.record(model, ["a"], tokenizer=lambda _: {"input_ids": IDS[0].tolist()})
        else:
            with ml.Recorder(model):
                model(IDS)


def test_a_hook_of_the_caller_that_is_added_inside_the_block_comes_first(model):
    gate, seen = model.model.layers[0].mlp.gate, []
    site = ml.Site("moe_out", (0,), "float32")
    with torch.no_grad(), ml.Recorder(model, signals=[site]) as recorder:
        gate.register_forward_hook(lambda _module, _args, output: (*output[:2], (output[2] + 1) % 8))
        model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: output * 2)
        model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
        model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: seen.append(output))
        model(IDS)
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.read("expert_id")[:, 0], seen[0])
    np.testing.assert_array_equal(trace.activations("moe_out").values[:, 0], seen[1][0])


@pytest.mark.parametrize("taken", ["before the block", "from the class"])
def test_a_generate_that_nobody_could_watch_is_refused(model, taken):
    before = model.generate
    with ml.Recorder(model) as recorder:
        model(IDS)
        with refused(RecordingError, "generate", "taken before"):
            if taken == "from the class":
                type(model).generate(model, IDS, max_new_tokens=2)
            else:
                before(IDS, max_new_tokens=2)
    assert recorder.trace().n_tokens == 6


@pytest.mark.parametrize("recorder", [ml.Recorder, lambda model: ml.CompiledRecorder(model, tokens=40)])
@torch.no_grad()
def test_a_copy_made_inside_the_block_is_another_model(model, recorder):
    edits = ml.edits.forbid(0, 1), ml.edits.forbid(1, 2, where=ml.edits.Where(positions=[1]))
    plain = model(IDS).logits
    with recorder(model) as recording, ml.edit(model, *edits):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(IDS).logits, plain)
        model(input_ids=IDS)
    assert recording.trace().n_tokens == 6
    assert torch.equal(copied(IDS).logits, plain)
    for weight in copied.parameters():
        weight.mul_(1.2)
    cache, read = DynamicCache(config=copied.config), IDS
    for _ in range(4):
        logits = copied(read[:, cache.get_seq_length() :], past_key_values=cache).logits
        read = torch.cat([read, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(copied.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None), read)
    with recorder(copied) as recording, ml.edit(copied, *edits):
        copied(input_ids=IDS)
    assert recording.trace().n_tokens == 6


@pytest.mark.parametrize("recorder", [ml.Recorder, lambda model: ml.CompiledRecorder(model, tokens=40)])
@torch.no_grad()
def test_a_recorder_is_entered_once_at_a_time(model, recorder):
    with recorder(model) as recording:
        with refused(BadInput, "Recorder"), recording:
            pass
        model(input_ids=IDS)
    assert recording.trace().n_tokens == 6
    assert not model.model.layers[0].mlp.gate._forward_hooks


def test_parts_of_data_parallel_are_refused(model):
    def replica(module):
        made = module._replicate_for_data_parallel()
        made._modules = {name: replica(child) for name, child in module._modules.items()}
        made._parameters, made._buffers = module._parameters, module._buffers
        return made

    with torch.no_grad(), refused(RecordingError, "model", "nn.DataParallel"), ml.Recorder(model):
        replica(model)(IDS)


def test_a_trace_names_the_model_that_was_entered(model):
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(IDS)
    model.bfloat16()
    assert recorder.trace().meta["model"]["dtype"] == "float32"
