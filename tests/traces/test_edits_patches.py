"""Patches and replaced expert outputs against forwards taken apart by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import xarray as xr
from accelerate import dispatch_model
from helpers.refusals import refused
from tiny import matrices_of, tiny_mixtral

import mixlens as ml
from mixlens import BadInput, ModelError, edits
from mixlens.interventions.where import Where
from mixlens.models.quantization.unfuse import unfuse

LAYER = 1
CLEAN = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))
OTHER = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
SITES = ("resid_pre", "resid_post", "attn_out", "moe_in", "moe_out", "expert_out", "expert_neurons")


@pytest.fixture(scope="module", params=["fused", "unfused"])
def net(request):
    return unfuse(tiny_mixtral()) if request.param == "unfused" else tiny_mixtral()


def forward(model, ids, *chosen, sites=SITES):
    signals = [ml.Site(site, dtype="float32") for site in sites]
    with torch.no_grad(), ml.Recorder(model, signals=signals) as recorder:
        if chosen:
            with ml.edit(model, *chosen):
                return model(ids, attention_mask=torch.ones_like(ids)).logits, recorder.trace()
        return model(ids, attention_mask=torch.ones_like(ids)).logits, recorder.trace()


def outputs_of_experts(moe, hidden, ids, weights, change):
    """Plain torch: sum over slots of weight x change(expert, token, output)."""
    out = torch.zeros(len(ids), hidden.shape[-1])
    for t in range(len(ids)):
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            w1, w3, w2 = matrices_of(moe.experts, expert)
            value = w2 @ (torch.nn.functional.silu(w1 @ hidden[t]) * (w3 @ hidden[t]))
            out[t] += weight * change(expert, t, value)
    return out


MEAN = torch.linspace(-1, 1, 32)
WAYS = {
    "zero": (edits.ablate(LAYER, [3, 5], how="zero"), lambda e, t, v: v * 0 if e in (3, 5) else v),
    "mean": (edits.ablate(LAYER, 3, how="mean", mean=MEAN), lambda e, t, v: MEAN if e == 3 else v),
    "patched": (edits.patch("expert_out", MEAN, layer=LAYER, expert=5), lambda e, t, v: MEAN if e == 5 else v),
    "zero at some": (
        edits.ablate(LAYER, 3, how="zero", where=Where(positions=[0, 4])),
        lambda e, t, v: v * 0 if e == 3 and t % 9 in (0, 4) else v,
    ),
    "each position its own": (
        edits.patch("expert_out", torch.stack([MEAN, -MEAN]), layer=LAYER, expert=3, where=Where(positions=[2, 6])),
        lambda e, t, v: {2: MEAN, 6: -MEAN}.get(t % 9, v) if e == 3 else v,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_replaced_outputs_against_the_experts_written_out(net, way):
    edit, change = WAYS[way]
    _, trace = forward(net, CLEAN, edit)
    _, plain = forward(net, CLEAN)
    site = {name: torch.tensor(trace.activations(name).sel(layer=LAYER).values) for name in SITES}
    ids, weights = (torch.tensor(trace.read(name)[:, LAYER]) for name in ("expert_id", "weight"))
    np.testing.assert_array_equal(ids, plain.read("expert_id")[:, LAYER])
    np.testing.assert_array_equal(weights, plain.read("weight")[:, LAYER])
    moe = net.model.layers[LAYER].mlp
    expected = outputs_of_experts(moe, site["moe_in"], ids, weights, change)
    torch.testing.assert_close(site["moe_out"], expected, atol=2e-3, rtol=1e-3)  # recorded weights: half precision
    for t in range(len(ids)):
        for slot, expert in enumerate(ids[t].tolist()):
            natural = torch.tensor(plain.activations("expert_out").sel(layer=LAYER).values[t, slot])
            torch.testing.assert_close(site["expert_out"][t, slot], change(expert, t, natural), atol=1e-5, rtol=1e-5)


def test_what_a_recorder_says_of_a_norm_is_that_of_the_value_put_in(net):
    _, trace = forward(net, CLEAN, edits.ablate(LAYER, 3, how="mean", mean=MEAN), sites=["expert_norm"])
    norms = trace.activations("expert_norm").sel(layer=LAYER).values
    np.testing.assert_allclose(norms[trace.read("expert_id")[:, LAYER] == 3], MEAN.norm(), rtol=1e-5)
    _, trace = forward(net, CLEAN, edits.ablate(LAYER, 3, how="zero"), sites=["expert_norm"])
    norms = trace.activations("expert_norm").sel(layer=LAYER).values
    assert (norms[trace.read("expert_id")[:, LAYER] == 3] == 0).all()


@pytest.mark.parametrize("site", SITES)
def test_a_patch_of_its_own_recording_changes_nothing_it_should_not(net, site):
    logits, trace = forward(net, CLEAN)
    patched, _ = forward(net, CLEAN, edits.patch(site, trace.activations(site), layer=LAYER))
    torch.testing.assert_close(patched, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_the_whole_residual_stream_of_another_run_gives_its_logits(net, site):
    logits, trace = forward(net, CLEAN)
    patched, _ = forward(net, OTHER, edits.patch(site, trace.activations(site), layer=LAYER))
    torch.testing.assert_close(patched, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_one_position_of_another_run(net, site):
    _, clean = forward(net, CLEAN)
    plain, own = forward(net, OTHER)
    patch = edits.patch(site, clean.activations(site), layer=LAYER, where=Where(positions=4))
    logits, trace = forward(net, OTHER, patch)
    found = trace.activations(site).sel(layer=LAYER).values.reshape(2, 9, -1)
    here, theirs = (t.activations(site).sel(layer=LAYER).values.reshape(2, 9, -1) for t in (own, clean))
    np.testing.assert_allclose(found[:, 4], theirs[:, 4], atol=1e-6)
    np.testing.assert_allclose(found[:, 5:], here[:, 5:], atol=1e-5)
    np.testing.assert_allclose(found[:, :4], here[:, :4], atol=1e-6)
    torch.testing.assert_close(logits[:, :4], plain[:, :4], atol=1e-5, rtol=1e-5)
    assert (logits[:, 4] - plain[:, 4]).abs().max() > 1e-3


def test_a_recording_of_the_last_token_patches_only_that(net):
    with torch.no_grad(), ml.Recorder(net, signals=[ml.Site("resid_post", tokens="last", dtype="float32")]) as recorder:
        logits = net(CLEAN, attention_mask=torch.ones_like(CLEAN)).logits
    values = recorder.trace().activations("resid_post")
    plain = forward(net, OTHER)[0]
    patched, _ = forward(net, OTHER, edits.patch("resid_post", values, layer=3))
    torch.testing.assert_close(patched[:, -1], logits[:, -1], atol=1e-5, rtol=1e-5)
    assert torch.equal(patched[:, :-1], plain[:, :-1])


def test_neurons_of_one_expert_against_its_down_projection(net):
    neurons = torch.linspace(-1, 1, 64)
    _, trace = forward(net, CLEAN, edits.patch("expert_neurons", neurons, layer=LAYER, expert=3))
    chose = trace.read("expert_id")[:, LAYER] == 3
    assert chose.any()
    down = matrices_of(net.model.layers[LAYER].mlp.experts, 3)[2] @ neurons
    outputs, kept = (trace.activations(site).sel(layer=LAYER).values for site in ("expert_out", "expert_neurons"))
    np.testing.assert_allclose(outputs[chose], np.broadcast_to(down, outputs[chose].shape), atol=1e-5)
    np.testing.assert_array_equal(kept[chose], np.broadcast_to(neurons, kept[chose].shape))
    same = forward(net, CLEAN, edits.patch("expert_out", down, layer=LAYER, expert=3))[0]
    torch.testing.assert_close(
        forward(net, CLEAN, edits.patch("expert_neurons", neurons, layer=LAYER, expert=3))[0], same
    )


@pytest.mark.parametrize("layout", [lambda net: net, unfuse], ids=["fused", "unfused"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_neurons_of_offloaded_experts(tmp_path, place, layout):
    patch = edits.patch("expert_neurons", torch.linspace(-1, 1, 64), layer=LAYER, expert=3)
    expected, trace = forward(layout(tiny_mixtral()), CLEAN, patch)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": place if i == LAYER else "cpu" for i in range(4)}
    net = dispatch_model(layout(tiny_mixtral()), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    logits, found = forward(net, CLEAN, patch)
    assert torch.equal(logits, expected)
    np.testing.assert_array_equal(found.activations("expert_out"), trace.activations("expert_out"))


def test_neurons_need_the_weights():
    net = tiny_mixtral()
    net.model.layers[LAYER].mlp.experts.to("meta")
    with refused(ModelError, "expert", 3), torch.no_grad():  # noqa: SIM117
        with ml.edit(net, edits.patch("expert_neurons", torch.zeros(64), layer=LAYER, expert=3)):
            net(CLEAN)
    assert not [name for module in net.modules() for name in vars(module) if name.startswith("_mixlens")]


def test_the_later_of_two_patches_of_one_site_holds(net):
    first, second = (edits.patch("moe_out", value, layer=LAYER) for value in (MEAN, -MEAN))
    _, trace = forward(net, CLEAN, first, second)
    found = trace.activations("moe_out").sel(layer=LAYER).values
    np.testing.assert_allclose(found, np.broadcast_to(-MEAN.numpy(), found.shape))
    zero, mean = edits.ablate(LAYER, 3, how="zero"), edits.ablate(LAYER, 3, how="mean", mean=MEAN)
    assert torch.equal(forward(net, CLEAN, zero, mean)[0], forward(net, CLEAN, mean)[0])
    assert torch.equal(forward(net, CLEAN, mean, zero)[0], forward(net, CLEAN, zero)[0])


def test_patches_while_decoding_with_a_cache(net):
    values = torch.stack([MEAN, -MEAN])
    patch = edits.patch("resid_post", values, layer=LAYER, where=Where(positions=[3, 10]))
    with ml.Recorder(net, signals=[ml.Site("resid_post", (LAYER,), "float32")]) as recorder, ml.edit(net, patch):
        net.generate(CLEAN, attention_mask=torch.ones_like(CLEAN), max_new_tokens=4, do_sample=False, eos_token_id=None)
    trace = recorder.trace()
    found, position = trace.activations("resid_post").sel(layer=LAYER).values, trace.read("position")
    np.testing.assert_array_equal(found[position == 3], np.stack([MEAN, MEAN]))
    np.testing.assert_array_equal(found[position == 10], np.stack([-MEAN, -MEAN]))


def test_means_of_experts_by_layer(net):
    means = xr.DataArray(
        np.random.default_rng(0).normal(size=(2, 8, 32)), dims=("layer", "expert", "hidden"), coords={"layer": [1, 2]}
    )
    both = forward(net, CLEAN, edits.ablate([1, 2], [3, 5], how="mean", mean=means))[0]
    single = [
        edits.ablate(layer, expert, how="mean", mean=means.sel(layer=layer).values[expert])
        for layer in (1, 2)
        for expert in (3, 5)
    ]
    assert torch.equal(both, forward(net, CLEAN, *single)[0])
    means[0, 3] = np.nan
    with refused(BadInput, "mean", [1]):
        edits.ablate([1, 2], 3, how="mean", mean=means)
    with refused(BadInput, "layers", [3]):
        edits.ablate([1, 3], 3, how="mean", mean=means)
    with refused(BadInput, "experts", [99]):
        edits.ablate(1, 99, how="mean", mean=means)
    with refused(BadInput, "mean", 31):
        forward(net, CLEAN, edits.ablate(1, 3, how="mean", mean=torch.zeros(31)))
    with refused(BadInput, "experts", [0, 8]):
        edits.ablate(1, [0, 8], how="mean", mean=means)
    with refused(BadInput, "mean", (32,)):
        edits.ablate(1, [3, 4], how="mean", mean=MEAN)


def test_an_edit_is_named_without_its_numbers(net):
    """Names of edits stand in run directories."""
    trace = forward(net, CLEAN)[1]
    means = xr.DataArray(np.zeros((1, 8, 32)), {"layer": [1]}, ("layer", "expert", "hidden"))
    for edit in (
        edits.ablate(1, 3, how="mean", mean=means),
        edits.patch("moe_out", MEAN, layer=1),
        edits.replay(trace),
    ):
        assert len(repr(edit)) < 300
        assert not {"tensor", "array", "<"} & set(re.findall(r"\w+|<", repr(edit)))


def test_a_patch_from_a_layer_that_was_not_recorded(net):
    values = forward(net, CLEAN, sites=["moe_out"])[1].activations("moe_out").sel(layer=[0, 2])
    with refused(BadInput, "layer", 1):
        edits.patch("moe_out", values, layer=1)
