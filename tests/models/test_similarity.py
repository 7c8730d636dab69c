"""Weight-space similarity against plain vectors."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens import BadInput, ModelError
from mixlens.models.quantization.unfuse import unfuse


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def test_cosines_of_every_matrix_and_of_router_vectors():
    net = tiny_mixtral()
    found = ml.experiments.measure_similarity(net)
    for layer in range(4):
        moe = net.model.layers[layer].mlp
        for i in range(8):
            for j in range(8):
                cell = found.sel(layer=layer, expert=i, expert_j=j)
                gate_i, up_i = moe.experts.gate_up_proj[i].chunk(2)
                gate_j, up_j = moe.experts.gate_up_proj[j].chunk(2)
                expected = {
                    "w1": cosine(gate_i, gate_j),
                    "w2": cosine(moe.experts.down_proj[i], moe.experts.down_proj[j]),
                    "w3": cosine(up_i, up_j),
                }
                for matrix, value in expected.items():
                    assert float(cell.cosine.sel(matrix=matrix)) == pytest.approx(value, abs=1e-5)
                assert float(cell.router_cosine) == pytest.approx(
                    cosine(moe.gate.weight[i], moe.gate.weight[j]), abs=1e-5
                )
        np.testing.assert_allclose(found.router_norm.sel(layer=layer), moe.gate.weight.detach().norm(dim=1), rtol=1e-5)


def test_upcycled_experts_with_shuffled_neurons_are_matched():
    net = tiny_mixtral()
    experts = net.model.layers[2].mlp.experts
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gate, up = experts.gate_up_proj[0].chunk(2)
        experts.gate_up_proj[1] = torch.cat([gate, up])
        experts.down_proj[1] = experts.down_proj[0]
        experts.gate_up_proj[2] = torch.cat([gate[order], up[order]])
        experts.down_proj[2] = experts.down_proj[0][:, order]
    found = ml.experiments.measure_similarity(net, layers=[2], match=True).sel(layer=2)
    copied, shuffled, other = (found.sel(expert=0, expert_j=j) for j in (1, 2, 5))
    assert float(copied.in_place) == pytest.approx(1, abs=1e-5)
    assert float(copied.matched) == pytest.approx(1, abs=1e-5)
    assert abs(float(shuffled.in_place)) < 0.2
    assert float(shuffled.matched) == pytest.approx(1, abs=1e-5)
    assert abs(float(other.in_place)) < 0.2
    assert float(other.in_place) < float(other.matched) < 0.5
    np.testing.assert_array_equal(found.matched.values.diagonal(), 1)


@pytest.mark.parametrize("neurons", [1, 2, 5])
def test_neurons_are_matched_as_the_best_of_all_permutations(neurons):
    net = tiny_mixtral(intermediate_size=neurons)
    found = ml.experiments.measure_similarity(net, layers=[1], match=True).sel(layer=1)
    experts = net.model.layers[1].mlp.experts
    rows = [torch.cat([*experts.gate_up_proj[e].chunk(2), experts.down_proj[e].T], dim=1) for e in range(8)]
    for i, j in ((0, 1), (2, 6), (7, 3)):
        table = [[cosine(one, other) for other in rows[j]] for one in rows[i]]
        best = max(sum(table[n][p[n]] for n in range(neurons)) for p in permutations(range(neurons)))
        assert float(found.matched.sel(expert=i, expert_j=j)) == pytest.approx(best / neurons, abs=1e-5)
        place = sum(table[n][n] for n in range(neurons)) / neurons
        assert float(found.in_place.sel(expert=i, expert_j=j)) == pytest.approx(place, abs=1e-5)


@pytest.mark.parametrize("layout", [lambda net: net, unfuse], ids=["fused", "unfused"])
def test_offloaded_and_unfused_experts_are_compared_too(tmp_path, layout):
    expected = ml.experiments.measure_similarity(tiny_mixtral(), match=True)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(4)}
    net = dispatch_model(layout(tiny_mixtral()), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert next(net.model.layers[1].mlp.experts.parameters()).is_meta
    found = ml.experiments.measure_similarity(net, match=True)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
    assert next(net.model.layers[1].mlp.experts.parameters()).is_meta


def test_what_cannot_be_done_is_said():
    net = tiny_mixtral()
    with refused(BadInput, "layers", [4]):
        ml.experiments.measure_similarity(net, layers=[4])
    net.model.layers[1].mlp.experts.to("meta")
    with refused(ModelError, "layer", 1):
        ml.experiments.measure_similarity(net)
