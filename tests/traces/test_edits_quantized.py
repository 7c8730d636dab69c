"""Edits, patches, captures and maps on quantized models: what holds whatever the weights are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens import edits
from mixlens.models.layout import expert_weights, moe_layers

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 3}
IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(7))
LAYER = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_mixtral(**SHAPE, initializer_range=0.08).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["nf4", "int8", "int8wo", "hqq4"])
def net(request, checkpoint):
    return ml.load(checkpoint, quantization=request.param, device_map="cpu", verbose=False)


def forward(model, *chosen, signals=()):
    with torch.no_grad(), ml.Recorder(model, signals=signals) as recorder:
        if chosen:
            with ml.edit(model, *chosen):
                logits = model(IDS, attention_mask=torch.ones_like(IDS)).logits
        else:
            logits = model(IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits, recorder.trace()


def test_replaying_its_own_routing_is_bit_identical(net):
    logits, trace = forward(net)
    assert torch.equal(forward(net, edits.replay(trace))[0], logits)


def test_a_forbidden_expert_is_never_recorded_and_weights_sum_to_one(net):
    logits, trace = forward(net, edits.forbid(LAYER, [2, 5]), edits.top_k(3))
    ids, weight = trace.read("expert_id"), trace.read("weight")
    assert ids.shape[-1] == 3
    assert not np.isin(ids[:, LAYER], [2, 5]).any()
    assert np.abs(weight.sum(-1) - 1).max() < 1e-6
    assert not torch.equal(logits, forward(net)[0])


def test_ablating_what_is_never_chosen_and_forcing_what_is_chosen_change_nothing(net):
    logits, trace = forward(net)
    ids = trace.read("expert_id")
    for layer in range(3):
        unused = sorted(set(range(8)) - set(ids[:, layer].ravel().tolist()))
        if unused:
            assert torch.equal(forward(net, edits.ablate(layer, unused))[0], logits)
    # One row alone, so that every token forces what it chose itself.
    where = edits.Where(positions=4, rows=1)
    forced = [edits.force(layer, ids[11 + 4, layer].tolist(), where=where) for layer in range(3)]
    assert torch.equal(forward(net, *forced)[0], logits)


def test_outputs_and_neurons_are_captured_and_put_back(net):
    sites = [ml.Site(name, dtype="float32") for name in ("expert_out", "expert_neurons", "moe_out")]
    bare = forward(net)[0]
    logits, trace = forward(net, signals=sites)
    assert torch.equal(logits, bare)
    outputs, weight = (torch.tensor(v) for v in (trace.activations("expert_out").values, trace.read("weight")))
    summed = (outputs * weight[..., None]).sum(2)
    torch.testing.assert_close(summed, torch.tensor(trace.activations("moe_out").values), atol=3e-3, rtol=3e-3)
    for site in ("expert_out", "expert_neurons"):
        again = forward(net, edits.patch(site, trace.activations(site), layer=LAYER))[0]
        torch.testing.assert_close(again, logits, atol=2e-2, rtol=2e-2)


def test_patched_neurons_go_through_the_quantized_down_projection(net):
    neurons = torch.linspace(-1, 1, 256)
    sites = [ml.Site("expert_out", dtype="float32")]
    _, trace = forward(net, edits.patch("expert_neurons", neurons, layer=LAYER, expert=3), signals=sites)
    chose = trace.read("expert_id")[:, LAYER] == 3
    assert chose.any()
    _, down, _ = expert_weights(moe_layers(net)[LAYER])
    expected = (down[3].float() @ neurons).numpy()
    found = trace.activations("expert_out").sel(layer=LAYER).values[chose]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=0.03 * np.abs(expected).max())


def test_a_map_is_that_of_forwards_under_the_edit(net):
    documents = ["a quantized model", "is measured too", "x"]
    options = {"tokenizer": Letters(), "settings": ml.RecordSettings(progress=False)}
    measured = ml.experiments.measure_importance(
        net, documents, ablation=ml.experiments.Ablation(layers=[LAYER]), **options
    )

    def losses() -> np.ndarray:
        trace = ml.record(net, documents, **options)
        return np.array([-np.nansum(trace.read("logprob")[trace.read("sequence") == s]) for s in range(3)])

    whole = losses()
    # Activations that int8 rounds depend on the tokens that are read together.
    tolerance = 0.05 * np.abs(measured.change).max().item()
    np.testing.assert_allclose(measured.value, whole, rtol=5e-3)
    for expert in range(0, 8, 3):
        with ml.edit(net, edits.ablate(LAYER, expert)):
            np.testing.assert_allclose(measured.change[:, 0, expert], losses() - whole, atol=max(tolerance, 1e-4))


def test_contributions_of_a_quantized_model_add_up(net):
    documents = ["a quantized model"]
    found = ml.experiments.measure_contributions(
        net, documents, tokenizer=Letters(), settings=ml.RecordSettings(progress=False)
    )
    parts: dict[str, torch.Tensor] = {}
    handles = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out, i=i: parts.__setitem__(f"attention {i}", out[0][0]))
        for i, layer in enumerate(net.model.layers)
    ]
    handles.append(net.model.norm.register_forward_pre_hook(lambda _m, args: parts.__setitem__("last", args[0][0])))
    ids = torch.tensor([Letters()(documents[0])["input_ids"]])
    with torch.no_grad():
        logits = net(ids).logits[0].float()
        parts["embedding"] = net.model.embed_tokens(ids)[0]
    for handle in handles:
        handle.remove()
    rows, last = net.lm_head.weight.detach().float(), parts.pop("last").float()
    scale = net.model.norm.weight.detach().float() / torch.sqrt(last.pow(2).mean(-1, keepdim=True) + 1e-5)
    for t in range(ids.shape[1] - 1):
        direction = scale[t] * (rows[ids[0, t + 1]] - rows.mean(0))
        rest = sum(float(part[t].float() @ direction) for part in parts.values())
        whole = float(logits[t, ids[0, t + 1]] - logits[t].mean())
        assert float(found.logit.values[t].sum()) + rest == pytest.approx(whole, abs=0.05)
