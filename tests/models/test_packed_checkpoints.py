"""Packed checkpoints: packed here by loops written from their formats, and read back to the same model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_mixtral
from transformers import GptOssConfig, GptOssForCausalLM

import mixlens as ml
from mixlens.errors import ModelError
from mixlens.models.layout import expert_weights, moe_layers
from mixlens.models.quantization.compressed_tensors import compressed_format
from mixlens.models.quantization.gptq_awq import packed_format
from mixlens.models.quantization.linears import dequantized

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns comes first, second ... from the lowest bit of an int32
IDS = torch.arange(3, 63).reshape(2, 30)


def put_bits(values, bits):
    """int32 words from small numbers, one bit after the other from the lowest."""
    stream = [int(value) >> bit & 1 for value in values for bit in range(bits)]
    words = [sum(bit << place for place, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]
    return np.array(words, np.uint32).view(np.int32)


def pack_gptq(number, zero, group, bits, first_format):
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32] of numbers [out, in] and zeros [out, groups]."""
    qweight = np.stack([put_bits(row, bits) for row in number], axis=1)
    rows = []
    for column in zero.T:
        words = put_bits(column, bits)
        if first_format and 32 % bits == 0:  # one less in every place, by whole words, as the format's writers do
            words = (words.view(np.uint32) - np.uint32(sum(1 << s for s in range(0, 32, bits)))).view(np.int32)
        elif first_format:
            words = put_bits((column - 1) % 2**bits, bits)
        rows.append(words)
    return {"qweight": qweight, "qzeros": np.stack(rows), "g_idx": group.astype(np.int32)}


def pack_awq(number, zero):
    """qweight [in, out / 8], qzeros [groups, out / 8]: eight outputs a word, in AWQ's order."""

    def words(row):
        return np.concatenate([put_bits(row[at : at + 8][list(AWQ_ORDER)], 4) for at in range(0, len(row), 8)])

    return {"qweight": np.stack([words(row) for row in number.T]), "qzeros": np.stack([words(row) for row in zero.T])}


def pack_compressed(number, zero, group, bits):
    """weight_packed [out, in * bits / 32], weight_zero_point [out * bits / 32, groups], by the format's own names."""
    return {
        "weight_packed": np.stack([put_bits(row, bits) for row in number]),
        "weight_zero_point": np.stack([put_bits(column, bits) for column in zero.T], axis=1),
        "weight_shape": np.array(number.shape),
        "weight_g_idx": group.astype(np.int32),
    }


def write(path, method, bits, *, shuffled=False, first_format=True):
    """A packed checkpoint, and the model that it means."""
    rng = np.random.default_rng(0)
    model = tiny_mixtral(head_dim=32).half()
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for key in [k for k in tensors if ".experts." in k or ".self_attn." in k]:
        base, (out, inputs) = key.removesuffix(".weight"), tensors.pop(key).shape
        number = rng.integers(0, 2**bits, (out, inputs))
        zero = rng.integers(0 if bits == 4 else 1, 2**bits, (out, inputs // GROUP))
        scale = (rng.uniform(0.5, 1.5, (out, inputs // GROUP)) * 0.4 / 2**bits).astype(np.float16)
        group = np.arange(inputs) // GROUP
        group = rng.permutation(group) if shuffled else group
        weight = (number - zero[:, group]) * scale[:, group].astype(np.float32)
        name = base.replace(".block_sparse_moe.", ".mlp.")
        _put(model, name, torch.tensor(weight, dtype=torch.float32))
        if method == "compressed-tensors":
            packed = {**pack_compressed(number, zero, group, bits), "weight_scale": scale}
        else:
            packed = pack_awq(number, zero) if method == "awq" else pack_gptq(number, zero, group, bits, first_format)
            packed["scales"] = np.ascontiguousarray(scale.T)
        tensors |= {f"{base}.{part}": torch.from_numpy(np.ascontiguousarray(v)) for part, v in packed.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    held = {"quant_method": method, "bits": bits, "group_size": GROUP}
    held |= {"version": "gemm"} if method == "awq" else {"checkpoint_format": "gptq" if first_format else "gptq_v2"}
    if method == "compressed-tensors":
        weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        held = {"quant_method": method, "format": "pack-quantized", "config_groups": groups}
    relabel(path, held)
    return model.float()


def relabel(path, held):
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": held}), "utf-8")


def _put(model, name, weight):
    *_, number, matrix = name.split(".")
    if ".experts." not in name:
        model.float().get_submodule(name).weight.data = weight
        return
    experts = model.float().get_submodule(name.removesuffix(f".{number}.{matrix}"))
    half = experts.intermediate_dim
    rows = {"w1": slice(0, half), "w3": slice(half, None)}
    target = experts.down_proj if matrix == "w2" else experts.gate_up_proj
    target.data[int(number), rows.get(matrix, slice(None))] = weight


@pytest.mark.parametrize(
    ("method", "bits", "options"),
    [
        ("gptq", 4, {}),
        ("gptq", 4, {"shuffled": True}),
        ("gptq", 4, {"first_format": False}),
        ("gptq", 2, {}),
        ("gptq", 3, {}),
        ("gptq", 8, {"shuffled": True}),
        ("awq", 4, {}),
        ("compressed-tensors", 4, {}),
        ("compressed-tensors", 4, {"shuffled": True}),
        ("compressed-tensors", 8, {}),
    ],
)
@torch.no_grad()
def test_a_packed_checkpoint_is_the_model_it_means(tmp_path, method, bits, options):
    meant = write(tmp_path, method, bits, **options)
    model = ml.load(tmp_path, device_map="cpu", verbose=False)
    meant.set_experts_implementation("eager")
    wanted = meant(IDS).logits
    assert (model(IDS).logits - wanted).norm() < 1e-3 * wanted.norm()
    for layer, other in zip(moe_layers(model), moe_layers(meant), strict=True):
        for held, written in zip(expert_weights(layer), expert_weights(other), strict=True):
            assert torch.equal(held, written)
    found = ml.audit(model)
    assert found.label == f"{'int' if method == 'compressed-tensors' else method}{bits}"
    overhead = (16 + 8) / GROUP + (
        32 if options.get("shuffled") else 0
    ) / 32  # an order for inputs, over 32 rows or more
    assert bits < found.of("experts")["bits_per_weight"] <= bits + overhead
    with ml.Recorder(model, lengths=[30, 30]) as recorder:
        model(IDS)
    assert recorder.trace().n_experts == 8


def test_a_checkpoint_that_is_quantized_in_another_way(tmp_path):
    write(tmp_path, "gptq", 4)
    assert ml.audit(ml.load(tmp_path, quantization="gptq", device_map="cpu", verbose=False)).label == "gptq4"
    with refused(ModelError, "quantization", "nf4"):
        ml.load(tmp_path, quantization="nf4", device_map="cpu", verbose=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoint_format": "marlin"}, ("quantization", ("gptq", 4))),
        ({"bits": 5}, ("quantization", ("gptq", 5))),
        ({"quant_method": "bitsandbytes"}, ("quantization", "bitsandbytes")),
        ({"quant_method": "mxfp4"}, ("quantization", "mxfp4")),
        ({"quant_method": "not yet invented"}, ("quantization", "not yet invented")),
    ],
)
def test_packed_forms_that_are_not_read(tmp_path, changes, named):
    write(tmp_path, "gptq", 4)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with refused(ModelError, *named):
        ml.load(tmp_path, device_map="cpu", verbose=False)


@torch.no_grad()
def test_a_method_in_capitals_and_packed_weights_of_another_shape(tmp_path):
    write(tmp_path, "awq", 4)
    plain = ml.load(tmp_path, device_map="cpu", verbose=False)(IDS).logits
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["quantization_config"]["quant_method"] = "AWQ"
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert torch.equal(ml.load(tmp_path, device_map="cpu", verbose=False)(IDS).logits, plain)
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}), "utf-8")
    with refused(ModelError, "model.layers.0.mlp.experts.0.w1", ([64, 32], [32, 32])):
        ml.load(tmp_path, device_map="cpu", verbose=False)


def test_packed_weights_that_are_missing_or_broken(tmp_path):
    write(tmp_path, "gptq", 4)
    tensors = load_file(tmp_path / "model.safetensors")
    broken = "model.layers.0.self_attn.q_proj"
    save_file({k: v for k, v in tensors.items() if k != f"{broken}.scales"}, tmp_path / "model.safetensors")
    with refused(ModelError, "weights", ["model.layers.0.self_attn.q_proj.scales"]):
        ml.load(tmp_path, device_map="cpu", verbose=False)
    tensors[f"{broken}.scales"] = tensors[f"{broken}.scales"].repeat(3, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    with refused(ModelError, "model.layers.0.self_attn.q_proj", 6):
        ml.load(tmp_path, device_map="cpu", verbose=False)


@pytest.mark.parametrize(
    "change",
    [
        {"input_activations": {"num_bits": 8, "type": "float"}},
        {"weights": {"num_bits": 8, "type": "float"}},
        {"format": "nvfp4-pack-quantized"},
    ],
)
def test_compressed_tensors_of_other_kinds_are_refused(change):
    group = {"weights": {"num_bits": 4, "type": "int"}, "format": "pack-quantized"}
    held = {"config_groups": {"one": group, "two": group | change}}
    with refused(ModelError, "quantization"):
        compressed_format("x", held, ["linear.weight_packed"])
    assert compressed_format("x", {"config_groups": {"one": group}}, ["linear.weight_packed"]).bits == 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compressed_tensors_without_zeros_and_with_one_scale_a_row(bits):
    rng = np.random.default_rng(bits)
    number = rng.integers(0, 2**bits, (8, 24))  # 24 numbers of 4 bits fill whole words, those of 2 bits do not
    scale = rng.uniform(0.5, 1.5, (8, 1)).astype(np.float32)
    tensors = {
        "linear.weight_packed": torch.from_numpy(np.stack([put_bits(row, bits) for row in number])),
        "linear.weight_shape": torch.tensor(number.shape),
        "linear.weight_scale": torch.from_numpy(scale),
    }
    held = {"format": "pack-quantized", "config_groups": {"one": {"weights": {"num_bits": bits, "type": "int"}}}}
    form = compressed_format("x", held, list(tensors))
    weight = dequantized(form.read("linear", tensors.__getitem__))
    np.testing.assert_allclose(weight, (number - 2 ** (bits - 1)) * scale, rtol=1e-6)
    other = dict(held, config_groups={"one": {"weights": {"num_bits": 4 if bits == 8 else 8, "type": "int"}}})
    with refused(ModelError, "linear"):
        compressed_format("x", other, list(tensors)).read("linear", tensors.__getitem__)


@torch.no_grad()
def test_fp8_by_blocks_is_the_model_it_means(tmp_path):
    """Where no GPU computes in fp8, transformers makes the weights whole again."""
    model = tiny_mixtral(head_dim=32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = dict(tensors)
    for key in [k for k in tensors if ".experts." in k]:
        tensors[key] = (tensors[key] * 8).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.full((1, 1), 1 / 8)
        plain[key] = tensors[key].float() / 8
    save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    wanted = ml.load(tmp_path, device_map="cpu", verbose=False)(IDS).logits
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    relabel(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    loaded = ml.load(tmp_path, device_map="cpu", verbose=False)
    assert ml.audit(loaded).label == "float32"
    assert torch.equal(loaded(IDS).logits, wanted)
    assert not torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize(("label", "stored"), [("gptq", 7), ("gptq_v2", 8), ("gptq", 8), ("gptq_v2", 7)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("said", [{"sym": True}, {}])
def test_zeros_that_contradict_their_label_are_refused(label, stored, bits, said):
    """Symmetric zeros, which need not be called so, are half of the range; the first format stores them less one."""
    half = 2 ** (bits - 1)
    stored = stored if bits == 4 else half + stored - 8
    rng = np.random.default_rng(0)
    number = rng.integers(0, 2**bits, (32, 64))
    group = np.arange(64) // GROUP
    packed = pack_gptq(number, np.full((32, 4), stored), group, bits, first_format=False)
    packed["scales"] = rng.uniform(0.5, 1.5, (4, 32)).astype(np.float16)
    tensors = {f"linear.{part}": torch.from_numpy(np.ascontiguousarray(v)) for part, v in packed.items()}
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": label, **said}
    form = packed_format("x", config, list(tensors))
    if (label, stored == half) in (("gptq", True), ("gptq_v2", False)):
        with refused(ModelError, "linear"):
            form.read("linear", tensors.__getitem__)
        return
    weight = dequantized(form.read("linear", tensors.__getitem__))
    expected = (number - half) * packed["scales"].T[:, group].astype(np.float32)
    np.testing.assert_allclose(weight.float(), expected, rtol=1e-2, atol=1e-2)


def test_bits_of_a_module_that_the_config_does_not_say_are_refused():
    number, group = np.zeros((32, 64), int), np.arange(64) // GROUP
    packed = pack_gptq(number, np.full((32, 4), 8), group, 4, first_format=False)
    tensors = {f"linear.{part}": torch.from_numpy(np.ascontiguousarray(v)) for part, v in packed.items()}
    tensors["linear.scales"] = torch.ones(4, 32, dtype=torch.float16)
    form = packed_format("x", {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, list(tensors))
    with refused(ModelError, "linear"):
        form.read("linear", tensors.__getitem__)


FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@torch.no_grad()
def test_gpt_oss_in_mxfp4_is_the_model_it_means(tmp_path):
    """Two numbers of four bits a byte, the first in the lower half; every 32 share a power of two."""
    rng = np.random.default_rng(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "vocab_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    meant = GptOssForCausalLM(GptOssConfig(**sizes, **heads, pad_token_id=0)).eval()
    meant.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj") and ".experts." in key]:
        experts, inputs, rows = tensors.pop(key).shape
        code = rng.integers(0, 16, (experts, rows, inputs // 32, 32))
        scale = rng.integers(120, 126, (experts, rows, inputs // 32))
        weight = (np.array(FP4)[code] * 2.0 ** (scale[..., None] - 127)).reshape(experts, rows, inputs)
        module, _, name = key.rpartition(".")
        getattr(meant.get_submodule(module), name).data = torch.tensor(weight, dtype=torch.float32).mT.contiguous()
        tensors[f"{key}_blocks"] = torch.from_numpy((code[..., ::2] | code[..., 1::2] << 4).astype(np.uint8))
        tensors[f"{key}_scales"] = torch.from_numpy(scale.astype(np.uint8))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    relabel(tmp_path, {"quant_method": "mxfp4"})
    model = ml.load(tmp_path, device_map="cpu", verbose=False, dtype="float32", experts="eager")
    meant.set_experts_implementation("eager")
    assert ml.audit(model).label in ("float32", "experts bfloat16, attention float32")
    torch.testing.assert_close(model(IDS).logits.float(), meant(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", [None, "int8wo"])
@pytest.mark.parametrize("parts", ["weight_scale", "weight_scale_inv", "qweight"])
def test_scales_of_which_the_config_says_nothing_are_refused(tmp_path, quantization, parts):
    tiny_mixtral().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.self_attn.q_proj"
    tensors[f"{key}.weight"] = tensors[f"{key}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{key}.{parts}"] = torch.full((1,), 0.5)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with refused(ModelError, "quantization", [f"{key}.{parts}"]):
        ml.load(tmp_path, device_map="cpu", quantization=quantization, verbose=False)
