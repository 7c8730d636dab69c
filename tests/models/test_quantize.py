"""Quantized loading: every scheme reaches the experts, the numbers are right, and what cannot be is said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens.errors import BadInput, ModelError
from mixlens.models.layout import expert_weights, moe_layers
from mixlens.models.quantization import linears as quantize_linears
from mixlens.models.quantization.grouped_linear import BITS, GroupedLinear, pack, unpack
from mixlens.models.quantization.linears import SCHEMES, dequantized, quantize_linear, scheme_of
from mixlens.models.quantization.unfuse import QuantizedRouter, unfuse

CPU = torch.device("cpu")
ON_CPU = [name for name in SCHEMES if name != "fp8"]
IDS = torch.arange(3, 63).reshape(2, 30)
# Rows of 128 and 256 weights, which every default group size divides.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_mixtral(**SHAPE).save_pretrained(path)
    return path


def scheme_of_linear(module):
    return scheme_of(module) if hasattr(module, "in_features") else None


def quantized(checkpoint, quantization, **options):
    return ml.load(checkpoint, quantization=quantization, device_map="cpu", verbose=False, **options)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("bits", BITS)
def test_packing_goes_there_and_back_without_gaps(bits):
    number = torch.randint(0, 2**bits, (5, 24), dtype=torch.uint8)
    packed = pack(number, bits)
    assert packed.nbytes * 8 == number.numel() * bits
    assert torch.equal(unpack(packed, bits).to(torch.uint8), number)


@pytest.mark.parametrize("bits", BITS)
def test_a_grouped_linear_computes_what_loops_say(bits):
    rng = np.random.default_rng(0)
    number = rng.integers(0, 2**bits, (3, 16))
    scale, zero = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)
    order = rng.permutation(16)
    linear = GroupedLinear(
        "own",
        bits,
        torch.tensor(number, dtype=torch.uint8),
        scale=torch.tensor(scale),
        zero=torch.tensor(zero),
        order=torch.tensor(order),
    )
    hidden = rng.normal(size=(4, 16)).astype(np.float32)
    wanted = np.zeros((4, 3))
    for row in range(4):
        for out in range(3):
            for column in range(16):
                place = order[column]
                weight = (number[out, place] - zero[out, place // 8]) * scale[out, place // 8]
                wanted[row, out] += hidden[row, column] * weight
    np.testing.assert_allclose(linear(torch.tensor(hidden)).numpy(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_scheme_computes_with_weights_near_its_own(name, dtype):
    torch.manual_seed(0)
    weight, hidden = torch.randn(64, 128) / 10, torch.randn(9, 128).to(dtype)
    linear = quantize_linear(weight, SCHEMES[name], CPU, dtype)
    held = dequantized(linear).float()
    assert scheme_of(linear) == name
    step = (weight.amax() - weight.amin()) / (2 ** SCHEMES[name].bits - 1)
    assert (held - weight).abs().max() < 1.2 * step + weight.abs().max() / 100
    output = linear(hidden)
    assert output.dtype == dtype
    rounding = 0.03 if name == "int8" or dtype == torch.bfloat16 else 1e-5  # int8 rounds activations too
    torch.testing.assert_close(output.float(), hidden.float() @ held.T, rtol=rounding, atol=rounding)


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ON_CPU)
@torch.no_grad()
def test_every_part_of_mixlens_works_on_a_quantized_model(checkpoint, name):
    plain, model = tiny_mixtral(**SHAPE), quantized(checkpoint, name)
    logits = model(IDS).logits
    assert not torch.allclose(logits, plain(IDS).logits, atol=1e-4)
    unfuse(plain)
    for place, linear in [(p, m) for p, m in model.named_modules() if p and scheme_of_linear(m) == name]:
        plain.get_submodule(place).weight.copy_(dequantized(linear))
    gap = (logits - plain(IDS).logits).norm() / logits.norm()
    assert gap < (0.1 if name == "int8" else 1e-5)  # int8 rounds activations too
    mask = torch.ones_like(IDS)
    with ml.Recorder(model, signals=["router_logits", "expert_out", "moe_out"]) as recorder:
        assert torch.equal(model(IDS, attention_mask=mask).logits, logits)
    trace = recorder.trace()
    parts = trace.activations("expert_out").values * trace.read("weight")[..., None].astype(np.float32)
    np.testing.assert_allclose(parts.sum(2), trace.activations("moe_out").values, rtol=2e-2, atol=2e-2)
    with ml.edit(model, ml.edits.ablate(1, 3)):
        assert not torch.equal(model(IDS, attention_mask=mask).logits, logits)
    written = model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False)
    first = logits[:, -1].argmax(-1)
    assert torch.equal(written[:, 30], first)


@torch.no_grad()
def test_a_mapping_gives_each_part_its_scheme(checkpoint):
    model = quantized(
        checkpoint,
        {
            "attention": "nf4",
            "experts": "hqq2",
            "router": "int8wo",
            "head": "hqq4",
            "*.layers.0.*": "none",
            "*.layers.1.mlp.experts.3.*": "hqq4-g32",
        },
    )
    first, second = moe_layers(model)
    assert scheme_of(first.experts[3].w1) == "float32"
    assert scheme_of(first.attention.q_proj) == "float32"
    assert {scheme_of(second.experts[n].w2) for n in (0, 1, 2, 4, 5, 6, 7)} == {"hqq2"}
    assert (second.experts[3].w2.scheme, second.experts[3].w2.scale.shape) == ("hqq4", (128, 8))
    assert scheme_of(second.attention.q_proj) == "nf4"
    assert isinstance(first.gate, QuantizedRouter)
    assert isinstance(second.gate, QuantizedRouter)
    assert scheme_of(model.lm_head) == "hqq4"
    plain = tiny_mixtral(**SHAPE)
    hidden = torch.randn(5, 128)
    for found, wanted in zip(first.gate(hidden), moe_layers(plain)[0].gate(hidden), strict=True):
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0.05, atol=0.05)


def test_router_and_head_are_spared_unless_they_are_named(checkpoint):
    model = quantized(checkpoint, {"*": "int8wo"})
    assert scheme_of(model.lm_head) == scheme_of(moe_layers(model)[0].gate) == "float32"
    assert scheme_of(moe_layers(model)[0].experts[0].w1) == "int8wo"


@torch.no_grad()
def test_nothing_quantized_is_the_unfused_model_bit_for_bit(checkpoint):
    whole = unfuse(tiny_mixtral(**SHAPE))
    streamed = quantized(checkpoint, "none")
    assert torch.equal(streamed(IDS).logits, whole(IDS).logits)


@torch.no_grad()
def test_it_loads_from_shards_and_from_later_names(tmp_path):
    plain = tiny_mixtral(**SHAPE)
    plain.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = quantized(tmp_path, {"attention": "int8wo"})
    w1, _, _ = expert_weights(moe_layers(model)[1])
    assert torch.equal(w1, expert_weights(moe_layers(plain)[1])[0])


@torch.no_grad()
def test_a_head_tied_to_the_embeddings(tmp_path):
    plain = tiny_mixtral(**SHAPE, tie_word_embeddings=True)
    plain.save_pretrained(tmp_path)
    assert torch.equal(quantized(tmp_path, "none")(IDS).logits, unfuse(plain)(IDS).logits)
    model = quantized(tmp_path, "nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = ml.audit(model)
    assert found.weights == ml.audit(plain).weights == sum(p.numel() for p in plain.parameters())
    with refused(BadInput, "quantization", "head"):
        quantized(tmp_path, {"head": "nf4"})


def test_more_bits_are_nearer(checkpoint):
    plain = expert_weights(moe_layers(tiny_mixtral(**SHAPE))[0])
    errors = []
    for name in ("hqq4", "hqq3", "hqq2"):
        held = expert_weights(moe_layers(quantized(checkpoint, {"experts": name}))[0])
        errors.append(sum(float((a - b).detach().square().sum()) for a, b in zip(held, plain, strict=True)))
    assert errors == sorted(errors)


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ("nf5", ("quantization", "nf5")),
        ("hqq4-g", ("quantization", "hqq4-g")),
        ("hqq4-g31", ("quantization", "hqq4-g31")),  # no multiple of 8
        ("nf4-g100", ("quantization", "nf4-g100")),  # no power of two
        ("int8-g64", ("quantization", "int8-g64")),  # one scale a row
        ("int4wo-g96", ("model.layers.0.self_attn.q_proj", 96)),  # rows of 128
        ({"*.layers.9.*": "nf4"}, ("quantization", "*.layers.9.*")),
        ({"norms": "nf4"}, ("quantization", "norms")),
        ({}, ("quantization", {})),
        ({"experts": 4}, ("quantization", 4)),
    ],
)
def test_schemes_that_cannot_be(checkpoint, quantization, named):
    with refused(BadInput, *named):
        quantized(checkpoint, quantization)


def test_a_package_that_is_not_here_names_what_works(checkpoint, monkeypatch):
    real = quantize_linears._quietly_imported

    def without_bitsandbytes(name):
        if name == "bitsandbytes":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(quantize_linears, "_quietly_imported", without_bitsandbytes)
    with refused(ModelError, "quantization", "bitsandbytes"):
        quantized(checkpoint, "nf4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_hardware_that_is_not_here_names_what_works(checkpoint):
    with refused(ModelError, "quantization", ["cpu"]):
        quantized(checkpoint, "fp8")


def test_experts_that_compute_another_way(checkpoint):
    with refused(BadInput, "experts", "grouped_mm"):
        quantized(checkpoint, "nf4", experts="grouped_mm")


@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}])
def test_quantized_layers_do_not_go_to_disk(checkpoint, device_map):
    with refused(BadInput, "device_map", "disk"):
        ml.load(checkpoint, quantization="nf4", device_map=device_map, verbose=False)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_of_another_shape_than_the_config_says(checkpoint, tmp_path, quantization):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}), "utf-8")
    with refused(ModelError, "model.layers.0.mlp.experts.0.w1", ([256, 128], [128, 128])):
        quantized(tmp_path, quantization)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_an_index_of_shards_that_is_broken(checkpoint, tmp_path, text):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors.index.json").write_text(text, "utf-8")
    with refused(ModelError, "model.safetensors.index.json", str(tmp_path)):
        quantized(tmp_path, "nf4")


def test_a_device_map_with_a_gap(checkpoint):
    with refused(BadInput, "device_map", "lm_head"):
        ml.load(checkpoint, quantization="nf4", device_map={"model": "cpu"}, verbose=False)
