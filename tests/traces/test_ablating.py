"""Maps computed from kept hidden states against one whole forward for every layer and expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from accelerate import dispatch_model
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens.experiments.ablator import Ablator

LENGTHS = (7, 1, 12, 9, 2, 12)


@pytest.fixture(scope="module")
def net():
    return tiny_mixtral()


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(4)
    return [random.integers(3, 128, n) for n in LENGTHS]


def loss(logits, target):
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


def plain(model, ids, metric, *chosen):
    """Sum over predicted tokens of one sequence, by one ordinary forward."""
    with torch.no_grad():
        if not chosen:
            logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
        else:
            with ml.edit(model, *chosen):
                logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
    return float(metric(logits, torch.from_numpy(ids[1:])).double().sum())


def right(logits, target):
    return (logits.argmax(-1) == target).float()


MEANS = xr.DataArray(
    np.random.default_rng(0).normal(size=(4, 8, 32)), dims=("layer", "expert", "hidden"), coords={"layer": range(4)}
)


@pytest.mark.parametrize("how", ["reroute", "zero", "mean"])
def test_a_map_equals_one_forward_for_every_layer_and_expert(net, sequences, how):
    means = MEANS if how == "mean" else None
    costs = Ablator(net, [0, 1, 2, 3], how=how, means=means).measure(sequences, batch_tokens=30)
    for row, ids in enumerate(sequences):
        whole = plain(net, ids, loss)
        assert costs.value[row] == pytest.approx(whole, abs=1e-4)
        assert costs.tokens[row] == len(ids) - 1
        for layer in range(4):
            for expert in range(8):
                without = plain(net, ids, loss, ml.edits.ablate(layer, expert, how=how, mean=means))
                assert costs.change[row, layer, expert] == pytest.approx(without - whole, abs=1e-4)


def test_any_metric_and_some_layers(net, sequences):
    costs = Ablator(net, [1, 3], how="reroute", metric=right).measure(sequences, batch_tokens=1000)
    for row, ids in enumerate(sequences):
        whole = plain(net, ids, right)
        for place, layer in enumerate((1, 3)):
            for expert in (0, 5):
                without = plain(net, ids, right, ml.edits.ablate(layer, expert))
                assert costs.change[row, place, expert] == without - whole


def test_a_value_that_is_nan_stays_so(net, sequences):
    def odd(logits, target):
        return loss(logits, target).masked_fill(target == int(sequences[0][-1]), torch.nan)

    costs = Ablator(net, [0], how="reroute", metric=odd).measure(sequences[:2], batch_tokens=1000)
    np.testing.assert_array_equal(np.isnan(costs.value), [True, False])
    np.testing.assert_array_equal(np.isnan(costs.change), [costs.chosen[0] > 0, np.zeros((1, 8), bool)])


def test_tokens_that_chose_are_counted_and_an_expert_nobody_chose_costs_nothing(net, sequences):
    costs = Ablator(net, [0, 1, 2, 3], how="reroute").measure(sequences, batch_tokens=30)
    with torch.no_grad(), ml.Recorder(net, signals=()) as recorder:
        for ids in sequences:
            net(torch.from_numpy(ids)[None])
    trace = recorder.trace()
    ids, sequence = trace.read("expert_id"), trace.read("sequence")
    for row in range(len(sequences)):
        expected = (ids[sequence == row][..., None] == np.arange(8)).sum((0, 2))
        np.testing.assert_array_equal(costs.chosen[row], expected)
    assert (costs.chosen == 0).any()
    assert (costs.change[costs.chosen == 0] == 0).all()


def test_batches_make_no_difference(net, sequences):
    one = Ablator(net, [0, 2], how="reroute").measure(sequences, batch_tokens=1)
    other = Ablator(net, [0, 2], how="reroute").measure(sequences, batch_tokens=1000)
    np.testing.assert_allclose(one.change, other.change, atol=1e-4)
    np.testing.assert_array_equal(one.chosen, other.chosen)


@pytest.mark.parametrize("batch_tokens", [5, 4])
def test_a_long_sequence_is_read_in_chunks(net, sequences, batch_tokens):
    forwards, long = [], sequences[2:4]
    handle = net.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: forwards.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    chunked = Ablator(net, [0, 2, 3], how="reroute").measure(long, batch_tokens=batch_tokens)
    handle.remove()
    assert max(forwards) == batch_tokens
    whole = Ablator(net, [0, 2, 3], how="reroute").measure(long, batch_tokens=1000)
    np.testing.assert_allclose(chunked.value, whole.value, atol=1e-4)
    np.testing.assert_allclose(chunked.change, whole.change, atol=1e-4)
    np.testing.assert_array_equal(chunked.chosen, whole.chosen)


def test_maps_under_other_edits_are_those_of_forwards_under_both(net, sequences):
    outer = [
        ml.edits.temperature(0.5),
        ml.edits.ablate(1, 2, how="zero"),
        ml.edits.patch("attn_out", MEANS[0, 0].values, layer=2),
    ]
    with ml.edit(net, *outer):
        costs = Ablator(net, [1, 2], how="reroute").measure(sequences[:1], batch_tokens=30)
        whole = plain(net, sequences[0], loss)
        for place, layer in enumerate((1, 2)):
            for expert in range(8):
                without = plain(net, sequences[0], loss, ml.edits.ablate(layer, expert))
                assert costs.change[0, place, expert] == pytest.approx(without - whole, abs=1e-4)
    some = ml.edits.forbid(1, 1, where=ml.edits.Where(positions=range(3)))
    stream = ml.edits.patch("resid_post", torch.zeros(32), layer=1)
    for edit in (some, stream):
        with refused(ml.BadInput, "edit", edit), ml.edit(net, edit):
            net(torch.from_numpy(sequences[0])[None])
            Ablator(net, [1], how="reroute")


def test_a_model_comes_back_as_it_was(net, sequences):
    layers, ids = net.model.layers, torch.from_numpy(sequences[2])[None]
    with torch.no_grad():
        before = net(ids).logits
        Ablator(net, [0, 3], how="zero").measure(sequences, batch_tokens=30)
        assert torch.equal(net(ids).logits, before)
    with pytest.raises(ZeroDivisionError):
        Ablator(net, [0], how="zero", metric=lambda *_: 1 / 0).measure(sequences, batch_tokens=30)
    assert net.model.layers is layers
    assert not net.model.layers[0].mlp.gate._forward_hooks


def test_offloaded_layers(net, sequences, tmp_path):
    expected = Ablator(net, [0, 3], how="reroute").measure(sequences, batch_tokens=30)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.3"]
    device_map = dict.fromkeys(parts, "cpu") | {f"model.layers.{i}": "disk" for i in range(3)}
    offloaded = dispatch_model(tiny_mixtral(), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    found = Ablator(offloaded, [0, 3], how="reroute").measure(sequences, batch_tokens=30)
    np.testing.assert_allclose(found.change, expected.change, atol=1e-6)
