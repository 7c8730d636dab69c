"""A run folder belongs to one model: whatever changes what the model computes makes it another's."""

from __future__ import annotations

import pytest
import torch
from helpers.refusals import refused
from peft import LoraConfig, get_peft_model
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens.errors import RunError

QUIET = ml.RecordSettings(progress=False)


def recorded(model, out):
    return ml.record(model, ["some text"], tokenizer=Letters(), settings=QUIET, out=out)


def one_weight(model):
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] += 1e-3


def two_rows(model):
    rows = model.model.layers[1].self_attn.q_proj.weight.data
    rows[0], rows[1] = rows[1].clone(), rows[0].clone()


def top_k(model):
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 3


def rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def epsilon(model):
    model.model.norm.variance_epsilon = 0.1


def activation(model):
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.GELU()


def hook(model):
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: output * 2)


def forward(model):
    layer = model.model.layers[0]
    whole = layer.forward
    layer.forward = lambda *args, **options: whole(*args, **options) * 2


def attention(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change",
    [one_weight, two_rows, torch.nn.Module.bfloat16, top_k, rope, epsilon, activation, hook, forward, attention],
)
def test_a_folder_is_not_taken_for_that_of_a_changed_model(change, tmp_path):
    model = tiny_mixtral(num_hidden_layers=2)
    recorded(model, tmp_path / "run")
    model.train()
    model.gradient_checkpointing_enable()
    with torch.no_grad(), ml.Recorder(model):  # leave no trace
        model(torch.arange(3, 9)[None])
    recorded(model, tmp_path / "run")
    change(model)
    with refused(RunError, "out"):
        recorded(model, tmp_path / "run")


def test_a_folder_recorded_under_one_adapter_is_not_taken_for_another(tmp_path):
    def lora():
        return LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")

    adapted = get_peft_model(tiny_mixtral(num_hidden_layers=2), lora(), adapter_name="legal")
    adapted.add_adapter("medical", lora())
    adapted.set_adapter("legal")
    recorded(adapted, tmp_path / "run")
    adapted.set_adapter("medical")
    with refused(RunError, "out"):
        recorded(adapted, tmp_path / "run")
