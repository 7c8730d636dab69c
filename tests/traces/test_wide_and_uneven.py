"""More than 256 experts, whose ids take 16 bits, and layers that choose different numbers of experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from safetensors.numpy import load_file
from tiny import tiny_mixtral

import mixlens as ml
from mixlens import BadInput, Trace, edits, stats

IDS = torch.arange(14).reshape(2, 7)
SEQUENCE = np.repeat([0, 1, 2], [9, 14, 7])
POSITION = np.concatenate([np.arange(9), np.arange(14), np.arange(7)])
TOKENS = {"sequence": SEQUENCE, "position": POSITION, "token_id": POSITION % 4}
STATISTICS = {
    "expert_share": "expert",
    "load_balance": None,
    "repetition": None,
    "position_profile": "expert",
    "coactivation": ("expert", "expert_j"),
    "transitions": ("expert", "expert_next"),
    "vocabulary_specialization": None,
    "predictability": None,
}


def wide(shift: int) -> Trace:
    """22 of the experts `shift` to `shift` + 255, of 512."""
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((len(SEQUENCE), 2, 256)), -1)[..., :22] + shift
    return Trace.from_arrays(ids, n_experts=512, weight=np.full(ids.shape, 1 / 22), tokens=TOKENS)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_of_512_experts_knows_them_apart(name):
    # Renamed by 256, experts have the same numbers under their new names; 8 bits would make them one.
    low, high = (getattr(stats, name)(wide(shift)) for shift in (0, 256))
    named = [dim for dim in low["estimate"].dims if str(dim).startswith("expert")]
    rolled = high["estimate"].roll(dict.fromkeys(named, -256), roll_coords=False)
    np.testing.assert_allclose(rolled.values, low["estimate"].values, rtol=1e-12)
    if STATISTICS[name] is not None:
        assert named
        assert float(high["estimate"].isel(dict.fromkeys(named, slice(256, None))).sum()) > 0


def test_wide_ids_are_kept_in_16_bits_on_disk(tmp_path):
    trace = wide(256)
    saved = trace.save(tmp_path / "run")
    assert load_file(tmp_path / "run" / "routing-00000.safetensors")["expert_id"].dtype == np.uint16
    assert saved.read("expert_id").dtype == np.uint16
    np.testing.assert_array_equal(saved.read("expert_id"), trace.read("expert_id"))
    assert saved.read("expert_id").max() > 255
    assert ml.view.tokens(saved)._repr_html_()


def gates(model, ids=IDS):
    """What the gates put out, by bare hooks: (weights, ids) of every layer."""
    found = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, output: found.append(output[1:]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_512_experts_of_which_a_token_chooses_22(compiled):
    model = tiny_mixtral(num_local_experts=512, num_experts_per_tok=22)
    recorder = ml.CompiledRecorder(model, tokens=64) if compiled else ml.Recorder(model)
    with torch.no_grad(), recorder:
        model(IDS, attention_mask=torch.ones_like(IDS))
    expected = torch.stack([ids for _, ids in gates(model)], 1).numpy()
    trace = recorder.trace()
    assert expected.max() > 255
    assert (trace.n_experts, trace.top_k) == (512, 22)
    np.testing.assert_array_equal(trace.read("expert_id"), expected)
    with torch.no_grad(), ml.edit(model, edits.replay(trace)), ml.Recorder(model) as again:
        model(IDS, attention_mask=torch.ones_like(IDS))
    np.testing.assert_array_equal(np.sort(again.trace().read("expert_id")), np.sort(expected))


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_choose_different_numbers_are_kept_as_they_are(tmp_path, compiled):
    model = tiny_mixtral()
    model.model.layers[1].mlp.gate.top_k = 1
    recorder = ml.CompiledRecorder(model, tokens=64) if compiled else ml.Recorder(model)
    with torch.no_grad(), recorder:
        model(IDS, attention_mask=torch.ones_like(IDS))
    trace = recorder.trace()
    assert trace.layer_top_k == tuple(2 if layer != 1 else 1 for layer in range(trace.n_layers))
    saved = trace.save(tmp_path / "run")
    for layer, (weight, ids) in enumerate(gates(model)):
        for found in (trace, saved, saved.select(layers=[0, layer])):
            one = found.select(layers=layer)
            np.testing.assert_array_equal(one.read("expert_id")[:, 0], ids)
            np.testing.assert_allclose(one.read("weight")[:, 0], weight, atol=1e-3)
            assert one.top_k == ids.shape[1]
    assert len(saved.to_pandas()) == saved.n_tokens * sum(saved.layer_top_k)
    assert (saved.to_xarray()["expert_id"].sel(layer=1, slot=1) == -1).all()
    with refused(BadInput, "layers", [1, 2]):
        stats.expert_share(saved)
    with refused(BadInput, "layers", [1, 2]):
        ml.view.tokens(saved)
    assert stats.expert_share(saved.select(layers=[0, 2]))["estimate"].sum("expert").values == pytest.approx(1)
    with torch.no_grad(), ml.edit(model, edits.replay(saved)):
        model(IDS, attention_mask=torch.ones_like(IDS))


def test_documents_are_recorded_under_an_edit_of_some_layers(letters):
    model = tiny_mixtral()
    with ml.edit(model, edits.top_k(1, layers=[0])):
        trace = ml.record(model, ["abc", "de"], tokenizer=letters, settings=ml.RecordSettings(progress=False))
    assert trace.layer_top_k[:2] == (1, 2)


@pytest.mark.parametrize("ids", [[[[-1, 0], [1, 2]]], [[[-1, -1], [0, 1]]]])
def test_slots_that_are_missing_come_last(ids):
    with refused(BadInput, "expert_id", -1):
        Trace.from_arrays(np.array(ids), n_experts=4)


def test_256_experts_take_8_bits_unless_layers_differ():
    even = Trace.from_arrays(np.array([[[255, 0], [3, 1]]]), n_experts=256)
    uneven = Trace.from_arrays(np.array([[[255, 0], [3, -1]]]), n_experts=256)
    assert even.read("expert_id").dtype == np.uint8
    assert even.layer_top_k == (2, 2)
    assert uneven.layer_top_k == (2, 1)
    assert uneven.select(layers=0).read("expert_id").tolist() == [[[255, 0]]]
