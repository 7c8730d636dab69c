"""The kernels of benchmarks/decode_kernels.py in Triton's interpreter, against nested loops. Run by `make kernels`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, repeat_kv

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off; `make kernels` turns it on", allow_module_level=True)

TOKENS, HIDDEN, INNER, EXPERTS, K = 2, 16, 32, 4, 2


@pytest.fixture(scope="module")
def kernels():
    path = Path(__file__).parent.parent / "benchmarks" / "decode_kernels.py"
    spec = importlib.util.spec_from_file_location("decode_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("wide", "deep"), [(16, 32), (4, 8)], ids=["whole rows", "parts of rows"])
def test_experts_equal_a_loop_over_tokens_and_slots(kernels, dtype, error, wide, deep):
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype) * 0.2
    down = torch.randn(EXPERTS, HIDDEN, INNER, dtype=dtype) * 0.2
    ids = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(TOKENS)])
    weights = torch.softmax(torch.randn(TOKENS, K), -1)
    act, out = torch.full((TOKENS * K, INNER), torch.nan, dtype=dtype), torch.full_like(x, torch.nan)
    kernels._gate_and_up[(INNER, TOKENS * K)](x, gate_up, ids, act, HIDDEN, INNER, K, 1, wide)
    kernels._down[(HIDDEN, TOKENS)](act, down, ids, weights, out, HIDDEN, INNER, K, 1, deep)
    truth = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for slot in range(K):
            expert = int(ids[token, slot])
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            truth[token] += weights[token, slot].double() * (down[expert].double() @ (gate * torch.sigmoid(gate) * up))
    assert torch.linalg.norm(out.double() - truth) < error * torch.linalg.norm(truth)


def test_the_router_of_two_maxima_chooses_and_weighs_as_top_k_does(kernels):
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2)
    router = MixtralTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(50, HIDDEN)
    for ours, theirs in zip(kernels.router_forward(router, hidden), router(hidden), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype))


def test_grouped_attention_reads_as_repeated_heads_do_behind_a_mask(kernels):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    mask = torch.rand(2, 1, 1, 10) > 0.3
    ours, _ = kernels.grouped_attention(None, query, key, value, mask)
    k, v = repeat_kv(key, 2), repeat_kv(value, 2)
    scores = (query @ k.transpose(-1, -2)) * 8**-0.5
    theirs = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
