"""load: what it gives, and what it says when it cannot."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch
from helpers.refusals import refused
from tiny import tiny_mixtral

from mixlens import BadInput, ModelError, Recorder, load
from mixlens.models.provenance import describe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_mixtral().save_pretrained(path)
    return path


@pytest.fixture
def variant(checkpoint, tmp_path):
    def make(**changes):
        shutil.copytree(checkpoint, tmp_path / "model")
        config = json.loads((checkpoint / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
        return tmp_path / "model"

    return make


def test_it_is_the_transformers_model_itself(checkpoint, capsys):
    model = load(checkpoint, device_map="cpu")
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not model.training
    assert model.dtype == torch.float32
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_mixtral()(ids).logits)
    shown = capsys.readouterr().err
    assert [shown.count(word) for word in ("top-2", " 8 ", "float32", "cpu", "grouped_mm")] == [1] * 5


def test_dtype_and_experts_are_as_asked(checkpoint):
    model = load(checkpoint, dtype="bfloat16", experts="eager", device_map="cpu", verbose=False)
    assert model.dtype == torch.bfloat16
    assert model.config._experts_implementation == "eager"


def test_provenance_tells_checkpoints_of_one_shape_apart(checkpoint):
    same, other = describe(load(checkpoint, verbose=False)), describe(tiny_mixtral(seed=1))
    assert same["config_sha256"] == other["config_sha256"]
    assert same["router_sha256"] == describe(tiny_mixtral())["router_sha256"] != other["router_sha256"]
    json.dumps(same)


PARTS = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}" for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")),
    *(f"{name}_layernorm.weight" for name in ("input", "post_attention")),
]
LACKING = sorted(f"model.layers.{layer}.{part}" for layer in (4, 5) for part in PARTS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 4096}, ("sliding_window", 4096)),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ("model", "LlamaForCausalLM")),
        ({"num_hidden_layers": 6}, ("weights", LACKING)),
        ({"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56}, ("memory", 541296058368)),
    ],
)
def test_a_config_that_will_not_do_is_said(variant, changes, named):
    with refused(ModelError, *named):
        load(variant(**changes), device_map="cpu", verbose=False)


def test_weights_that_are_not_there_or_broken(variant):
    path = variant()
    weights = path / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(5000)
    with refused(ModelError, "weights"):
        load(path, verbose=False)
    weights.unlink()
    with refused(ModelError, "weights"):
        load(path, verbose=False)


@pytest.mark.parametrize("quantization", [None, "hqq4-g32"])
def test_memory_that_runs_out_is_not_taken_for_broken_weights(checkpoint, monkeypatch, quantization):
    def allocate(*_, **__):
        torch.empty(2**58, dtype=torch.float32)

    monkeypatch.setattr("mixlens.models.load.AutoModelForCausalLM.from_pretrained", allocate)
    monkeypatch.setattr("mixlens.models.load.fill", allocate)
    with refused(ModelError, "memory"):
        load(checkpoint, quantization=quantization, verbose=False)


def test_pickled_weights_are_not_read(variant):
    path = variant()
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    with refused(ModelError, "weights"):
        load(path, verbose=False)


def test_the_hub_out_of_reach_and_a_folder_without_config(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused(ModelError, "model", "mistralai/Mixtral-8x7B-v0.1"):
        load("mistralai/Mixtral-8x7B-v0.1", verbose=False)
    with refused(ModelError, "config.json", str(tmp_path)):
        load(tmp_path, verbose=False)


def test_arguments_that_cannot_be(checkpoint):
    with refused(BadInput, "dtype", "int3"):
        load(checkpoint, dtype="int3")
    with refused(BadInput, "experts", "fastest"):
        load(checkpoint, experts="fastest", verbose=False)


def test_layers_go_to_disk_and_leave_nothing_behind(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    model = load(checkpoint, device_map=places, dtype="float32", verbose=False)
    assert model.model.layers[1].mlp.experts.gate_up_proj.device.type == "meta"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), Recorder(model, signals=["expert_norm"]) as split:
        logits = model(ids).logits
    whole = tiny_mixtral()
    with torch.no_grad(), Recorder(whole, signals=["expert_norm"]) as plain:
        torch.testing.assert_close(logits, whole(ids).logits)
    found = split.trace().activations("expert_norm") - plain.trace().activations("expert_norm")
    assert abs(found).max() < 1e-2
    assert list(tmp_path.iterdir())
    del model, split
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_here(checkpoint):
    with refused(ModelError, "device_map", ["cuda:0"]):
        load(checkpoint, device_map={"": "cuda:0"})
