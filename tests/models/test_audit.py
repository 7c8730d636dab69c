"""audit: true bytes against oracles, labels that are earned, and what transformers' own quantization leaves out."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.displayed import numbers
from helpers.refusals import refused
from tiny import tiny_mixtral
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import mixlens as ml
from mixlens.cli.main import main
from mixlens.errors import BadInput
from mixlens.models.demo import demo_path
from mixlens.models.provenance import describe
from mixlens.models.quantization.linears import SCHEMES
from mixlens.models.quantization.unfuse import unfuse

ON_CPU = [name for name in SCHEMES if name != "fp8"]
# Bits a weight of the demo model's experts, [256, 128]: numbers, then scales and zeros by hand.
EXPERT_BITS = {
    "nf4": 4 + 32 / 64 + 16 * 32 / (256 * 128),  # a float32 a block, and a code book of 16 float32 a Linear
    "int4wo": 4 + (16 + 8) / 128,  # float16 scale and uint8 zero a group
    "hqq4": 4 + 32 / 64,
    "hqq3": 3 + 32 / 64,
    "hqq2": 2 + 32 / 64,
}


def demo(quantization, **options):
    return ml.load("demo", quantization=quantization, device_map="cpu", verbose=False, **options)


def test_a_plain_model_is_what_its_parameters_say():
    model = tiny_mixtral().to(torch.bfloat16)
    found = ml.audit(model)
    sizes = {"experts": 0, "router": 0, "attention": 0}
    for name, parameter in model.named_parameters():
        for kind, part in (("experts", ".experts."), ("router", ".gate."), ("attention", ".self_attn.")):
            sizes[kind] += parameter.nbytes if part in name else 0
    assert {kind: found.of(kind)["bytes"] for kind in sizes} == sizes
    assert found.bytes == 2 * found.weights == sum(p.nbytes for p in model.parameters())
    assert (found.label, found.of_bf16, found.remarks) == ("bfloat16", 1.0, ())
    assert found.table["share"].sum() == pytest.approx(1)
    assert ml.audit(unfuse(model)).summary() == found.summary()


def test_every_number_of_every_row_as_a_table_and_as_text():
    model = tiny_mixtral()
    model.lm_head.to(torch.bfloat16)
    parts = {
        "attention": ".self_attn.",
        "router": ".gate.",
        "experts": ".experts.",
        "embeddings": "embed_",
        "norms": "norm",
    }
    parts["head"] = "lm_head"
    held = {kind: [p for name, p in model.named_parameters() if part in name] for kind, part in parts.items()}
    total = sum(p.numel() for p in model.parameters())
    found = ml.audit(model)
    lines = {line.split()[0]: numbers(line)[-5:] for line in repr(found).splitlines() if line.split()[:1]}
    for kind, own in held.items():
        (row,) = found.table[found.table["kind"] == kind].to_dict("records")
        weights, size = sum(p.numel() for p in own), sum(p.nbytes for p in own)
        expected = [weights, weights / total, size, 8 * size / weights, size / (2 * weights)]
        columns = ("weights", "share", "bytes", "bits_per_weight", "of_bf16")
        assert [row[name] for name in columns] == pytest.approx(expected)
        assert lines[kind] == pytest.approx([weights, 100 * weights / total, *expected[2:]], abs=0.051)
    whole = sum(p.nbytes for p in model.parameters())
    assert lines["all"][-4:] == pytest.approx([100, whole, 8 * whole / total, whole / (2 * total)], abs=0.051)


@pytest.mark.parametrize("name", ON_CPU)
def test_true_bytes_of_every_scheme(name):
    model = demo(name)
    found = ml.audit(model)
    experts = found.of("experts")
    assert found.label == name
    assert found.weights == ml.audit(demo("none")).weights
    if name in EXPERT_BITS:
        assert experts["bits_per_weight"] == pytest.approx(EXPERT_BITS[name])
    assert experts["of_bf16"] <= (0.30 if SCHEMES[name].bits <= 4 else 0.55)
    assert found.of("router")["bits_per_weight"] == found.of("head")["bits_per_weight"] == 32
    with torch.no_grad():
        model(torch.arange(3, 40)[None])
    assert ml.audit(model).summary() == found.summary()


@pytest.mark.parametrize(("option", "scheme"), [("load_in_4bit", "fp4"), ("load_in_8bit", "int8")])
def test_what_transformers_itself_quantizes(option, scheme):
    """When this fails, transformers or bitsandbytes has learned to reach the experts (bitsandbytes issue 1849)."""
    config = BitsAndBytesConfig(**{option: True})
    model = AutoModelForCausalLM.from_pretrained(
        demo_path(), quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    found = ml.audit(model)
    assert found.label == f"experts bfloat16, attention {scheme}"
    assert found.of("experts")["of_bf16"] == 1
    assert 0.95 < found.of_bf16 < 1
    sizes = {name: weight.numel() for name, weight in demo(None).named_parameters()}
    share = sum(size for name, size in sizes.items() if ".experts." in name) / sum(sizes.values())
    assert f" {share:.1%} " in found.remarks[0]
    assert "bfloat16" in found.remarks[0]


def test_a_label_is_not_given_for_numbers_in_wider_containers():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    model = unfuse(tiny_mixtral())
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and ".experts." in name)
    experts = ml.audit(model).of("experts")
    assert experts["bits_per_weight"] > 8
    assert "int4" not in ml.audit(model).label.lower().replace("toint8tensor", "")


def test_a_linear_of_another_package_without_a_weight():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 32, 32
            self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))

    model = tiny_mixtral()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed()
    rows = ml.audit(model).table.set_index(["kind", "scheme"])
    assert rows.loc[("attention", "Packed"), ["weights", "bytes"]].tolist() == [4 * 32 * 32, 4 * 4 * 4 * 32]


def test_mixtures_are_told_apart():
    found = ml.audit(demo({"attention": "nf4", "experts": "hqq2", "*.layers.0.*": "none"}))
    assert found.label == "experts hqq2 (87.5%) and float32 (12.5%), attention nf4 (87.5%) and float32 (12.5%)"
    assert set(found.table.loc[found.table["kind"] == "experts", "scheme"]) == {"hqq2", "float32"}


def test_offloaded_weights_are_counted(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    found = ml.audit(ml.load(tmp_path, device_map=places, verbose=False))
    assert found.bytes == ml.audit(tiny_mixtral()).bytes
    offloaded = sum(weight.nbytes for i in (1, 3) for weight in tiny_mixtral().model.layers[i].parameters())
    assert re.match(r"[\d,]+", found.remarks[0])[0] == f"{offloaded:,}"


def test_it_goes_into_the_provenance_of_a_run(tmp_path):
    model = demo("nf4")
    described = describe(model)
    assert described["audit"]["label"] == "nf4"
    assert described["parameters"] == described["audit"]["weights"] == describe(demo(None))["parameters"]
    ml.record(model, ["a few words of text"], out=tmp_path / "run", signals=())
    meta = json.loads((tmp_path / "run" / "meta.json").read_text("utf-8"))
    assert meta["model"]["audit"] == described["audit"]


def test_it_shows_itself():
    found = ml.audit(tiny_mixtral())
    assert "experts float32" in " ".join(repr(found).split())
    page = found._repr_html_()
    assert page.count("<tr") == 8
    assert "100.0%" in page


def test_what_cannot_be_audited():
    with refused(BadInput, "model", "Sequential"):
        ml.audit(nn.Sequential())
    with refused(BadInput, "kind", "heads"):
        ml.audit(tiny_mixtral()).of("heads")


def test_the_command(capsys):
    assert main(["audit", "demo", "--device-map", "cpu", "--quantization", "attention=int8,experts=nf4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "experts nf4, attention int8"
    assert main(["audit", "demo", "--device-map", "cpu", "--quantization", "int3"]) == 2
    assert "'int3'" in capsys.readouterr().err
