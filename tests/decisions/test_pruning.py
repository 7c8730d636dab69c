"""Pruned models against routers that decide among the kept experts by loops, and against what transformers loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from helpers.families import CASES, Case
from safetensors import safe_open
from tiny import Letters, tiny_mixtral
from transformers import AutoModelForCausalLM

import mixlens as ml
from mixlens.errors import BadInput, ModelError, RunError
from mixlens.models.layout import moe_layers
from mixlens.models.quantization.unfuse import unfuse

KEPT = [0, 2, 3, 5, 6, 7]
IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
IN_GROUPS = {"deepseek_v2", "mistral4"} | {case.name for case in CASES if case.formula.__name__ == "deepseek_v3"}
OTHER_LAYOUT = {"jetmoe", "llama4", "hunyuan_v1_moe", "afmoe"}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def among_the_kept(case: Case, layer):
    """A hook by which a router decides by its family's formula, as if there were the kept experts alone."""

    def hook(_module, _args, output):
        logits, weights, ids = layer.read(output)
        numbers = case.of(layer.gate, layer.moe, logits.shape[-1])
        numbers.bias = [numbers.bias[expert] for expert in KEPT]
        ids, weights = ids.clone(), weights.clone()
        for token, row in enumerate(logits.float().tolist()):
            chosen = case.formula([row[expert] for expert in KEPT], numbers)
            for slot, (place, weight) in enumerate(chosen):
                ids[token, slot], weights[token, slot] = KEPT[place], weight
        return layer.write(output, logits, weights, ids)

    return layer.gate.register_forward_hook(hook)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pruned_model_decides_among_what_it_kept_and_loads_in_plain_transformers(case, tmp_path):
    model = case.model()
    layers = moe_layers(model)
    keep = {layer.index: KEPT for layer in layers}
    if case.name in IN_GROUPS | OTHER_LAYOUT:
        with pytest.raises(ModelError) as refused:
            ml.decisions.prune(model, keep)
        assert refused.value.argument == ("groups" if case.name in IN_GROUPS else "experts")
        return
    pruned = ml.decisions.prune(model, keep)
    before = logits_of(model)
    hooks = [among_the_kept(case, layer) for layer in layers]
    torch.testing.assert_close(logits_of(pruned), logits_of(model), atol=2e-5, rtol=1e-4)
    for hook in hooks:
        hook.remove()
    assert torch.equal(logits_of(model), before)
    folder = ml.decisions.save(pruned, tmp_path / "pruned")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder).eval()), logits_of(pruned))


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


def test_a_saved_demo_has_the_names_of_the_hub_and_quantizes(demo, tmp_path):
    folder = ml.decisions.save(ml.decisions.prune(demo, dict.fromkeys(range(8), KEPT)), tmp_path / "six")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (6, 2)
    assert config["mixlens_pruned"]["kept"] == {str(layer): KEPT for layer in range(8)}
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if ".block_sparse_moe." in name}  # noqa: SIM118 (not a mapping)
    experts = {f"experts.{expert}.w{matrix}.weight" for expert in range(6) for matrix in (1, 2, 3)}
    assert names == {
        f"model.layers.{i}.block_sparse_moe.{part}" for i in range(8) for part in (*experts, "gate.weight")
    }
    assert ml.load(folder, quantization="nf4", verbose=False).model.layers[0].mlp.gate.weight.shape == (6, 128)
    trace = ml.record(ml.load(folder, verbose=False), ["a b c"], settings=ml.RecordSettings(progress=False))
    assert trace.n_experts == 6


def test_the_original_is_left_alone_and_shares_what_did_not_change(demo):
    before = {name: value.clone() for name, value in demo.state_dict().items()}
    pruned = ml.decisions.prune(demo, dict.fromkeys(range(8), KEPT))
    assert all(torch.equal(value, before[name]) for name, value in demo.state_dict().items())
    assert demo.config.num_local_experts == 8
    same = {name for name, value in pruned.named_parameters() if value is demo.get_parameter(name)}
    assert same == {name for name in before if ".mlp." not in name}


def test_pruning_twice_keeps_the_numbers_of_the_first_model(demo):
    once = ml.decisions.prune(demo, dict.fromkeys(range(8), KEPT))
    twice = ml.decisions.prune(once, {layer: [1, 2, 5] for layer in range(8)})
    assert twice.config.mixlens_pruned["kept"] == {str(layer): [2, 3, 7] for layer in range(8)}
    direct = ml.decisions.prune(demo, {layer: [2, 3, 7] for layer in range(8)})
    assert torch.equal(logits_of(twice), logits_of(direct))


def test_means_in_the_place_of_experts_are_what_an_edit_puts_there():
    model = tiny_mixtral()
    generator = np.random.default_rng(0)
    means = xr.DataArray(generator.normal(size=(4, 8, 32)), dims=("layer", "expert", "hidden"))
    means = means.assign_coords(layer=range(4), expert=range(8))
    gone = {0: [1, 4], 2: [0]}
    keep = {layer: sorted(set(range(8)) - set(experts)) for layer, experts in gone.items()}
    pruned = ml.decisions.prune(model, keep, means=means)
    edits = [ml.edits.ablate(layer, experts, how="mean", mean=means) for layer, experts in gone.items()]
    with ml.edit(model, *edits):
        wanted = logits_of(model)
    assert not torch.allclose(wanted, logits_of(model), atol=1e-3)
    torch.testing.assert_close(logits_of(pruned), wanted, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    with pytest.raises(ModelError):
        ml.decisions.save(pruned, "nowhere")


def test_a_pruned_model_still_trains():
    pruned = ml.decisions.prune(tiny_mixtral(), dict.fromkeys(range(4), KEPT)).train()
    loss = pruned(IDS, labels=IDS, output_router_logits=True).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert pruned.model.layers[0].mlp.experts.down_proj.grad.shape[0] == 6


@pytest.mark.parametrize(
    ("keep", "argument"),
    [
        ({layer: [1] for layer in range(4)}, "keep"),  # fewer than a token chooses
        ({0: KEPT, 1: KEPT, 2: KEPT, 3: [0, 1]}, "keep"),  # not as many in each layer
        ({0: KEPT}, "keep"),
        ({layer: range(8) for layer in range(4)}, "keep"),
        ({layer: [0, 1, 8] for layer in range(4)}, "keep"),
        ({7: KEPT}, "keep"),
        (6, "keep"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, argument):
    with pytest.raises(BadInput) as refused:
        ml.decisions.prune(tiny_mixtral(), keep)
    assert refused.value.argument == argument


def test_models_that_cannot_be_taken_apart_are_refused(tmp_path):
    keep = dict.fromkeys(range(4), KEPT)
    with pytest.raises(ModelError) as refused:
        ml.decisions.prune(unfuse(tiny_mixtral()), keep)
    assert refused.value.argument == "experts"
    model = tiny_mixtral()
    model.model.layers[1].mlp.gate = model.model.layers[0].mlp.gate
    with pytest.raises(ModelError):
        ml.decisions.prune(model, keep)
    model = tiny_mixtral()
    with ml.edit(model, ml.edits.forbid(0, 1)), pytest.raises(ModelError) as refused:
        ml.decisions.prune(model, keep)
    assert refused.value.argument == "model"
    with pytest.raises(BadInput):  # no mean is known of what goes
        ml.decisions.prune(model, keep, means=xr.DataArray(np.zeros((4, 8, 5)), dims=("layer", "expert", "hidden")))
    quantized = ml.load("demo", quantization="nf4", verbose=False)
    with pytest.raises(ModelError):
        ml.decisions.save(quantized, tmp_path / "held")
    assert not (tmp_path / "held").exists()


def test_a_folder_that_holds_something_is_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RunError):
        ml.decisions.save(tiny_mixtral(), tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_strongest_keeps_the_highest_and_never_an_expert_that_has_no_score():
    scores = xr.DataArray([[3.0, np.nan, 3.0, 1.0], [np.nan, np.nan, -1.0, 0.0]], dims=("layer", "expert"))
    assert ml.decisions.strongest(scores, 2).values.tolist() == [[True, False, True, False], [False, False, True, True]]
    assert ml.decisions.strongest(scores, 1).values.tolist()[0] == [True, False, False, False]
    for wrong in (0, 5, 1.5):
        with pytest.raises(BadInput):
            ml.decisions.strongest(scores, wrong)


def test_the_tokenizer_comes_along_or_its_absence_is_no_fault(tmp_path, demo):
    small = ml.decisions.prune(tiny_mixtral(), dict.fromkeys(range(4), KEPT))
    folder = ml.decisions.save(small, tmp_path / "tiny")
    assert not (folder / "tokenizer.json").exists()
    assert ml.record(ml.load(folder, verbose=False), ["a b"], tokenizer=Letters()).n_experts == 6
