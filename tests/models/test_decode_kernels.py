"""The kernels of mixlens/models/decode_kernels.py in Triton's interpreter, against a loop. Run by `make kernels`."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off; `make kernels` turns it on", allow_module_level=True)

from mixlens.models import decode_kernels as kernels

TOKENS, HIDDEN, INNER, EXPERTS, K = 2, 16, 32, 4, 2


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("wide", "deep"), [(16, 32), (4, 8)], ids=["whole rows", "parts of rows"])
def test_experts_equal_a_loop_over_tokens_and_slots(dtype, error, wide, deep):
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
