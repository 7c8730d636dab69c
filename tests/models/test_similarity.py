"""Weight-space similarity against plain vectors."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from tiny import tiny_mixtral

import mixlens as ml
from mixlens import BadInput, ModelError
from mixlens.models.similarity import assignment


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def test_cosines_of_every_matrix_and_of_router_vectors():
    net = tiny_mixtral()
    found = ml.expert_similarity(net)
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
    found = ml.expert_similarity(net, layers=[2], match=True).sel(layer=2)
    copied, shuffled, other = (found.sel(expert=0, expert_j=j) for j in (1, 2, 5))
    assert float(copied.in_place) == pytest.approx(1, abs=1e-5)
    assert float(copied.matched) == pytest.approx(1, abs=1e-5)
    assert abs(float(shuffled.in_place)) < 0.2
    assert float(shuffled.matched) == pytest.approx(1, abs=1e-5)
    assert abs(float(other.in_place)) < 0.2
    assert float(other.in_place) < float(other.matched) < 0.5
    np.testing.assert_array_equal(found.matched.values.diagonal(), 1)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_assignment_is_the_best_of_all_permutations(n):
    for seed in range(20):
        gain = np.random.default_rng(seed).normal(size=(n, n))
        columns = assignment(gain)
        assert sorted(columns.tolist()) == list(range(n))
        best = max(sum(gain[i, p[i]] for i in range(n)) for p in permutations(range(n)))
        assert gain[np.arange(n), columns].sum() == pytest.approx(best)


def test_what_cannot_be_done_is_said():
    net = tiny_mixtral()
    with pytest.raises(BadInput, match="layers 0 to 3"):
        ml.expert_similarity(net, layers=[4])
    net.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(ModelError, match="expert weights of layer 1 .* offloaded"):
        ml.expert_similarity(net)
