"""Triton kernels of the experts for one token a row, which read each chosen weight once, where it lies.

On an H200 they shortened a compiled step of 8x7B's width by 8 % against `batched_mm` (four layers; see
benchmarks/README.md). They compute what transformers computes, in another order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[reportMissingImports]  comes with torch for CUDA alone
import triton.language as tl  # type: ignore[reportMissingImports]
from torch.library import triton_op, wrap_triton

# Rows and columns of a weight that one program reads at a time: powers of two, and fewer columns where these do not
# divide the shape. The fastest of ten tried on an H200 for 8x7B's shape.
UP_ROWS, UP_COLUMNS = 1, 4096
DOWN_ROWS, DOWN_COLUMNS = 1, 2048


@triton.jit
def _gate_and_up(
    x_ptr,
    w_ptr,
    ids_ptr,
    act_ptr,
    hidden: tl.constexpr,
    inner: tl.constexpr,
    k: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """silu(w1 x) * (w3 x) of the expert in one slot of one token, rounded where eager rounds."""
    slot = tl.program_id(1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    w = w_ptr + expert * (2 * inner * hidden)
    gate = tl.zeros((rows,), tl.float32)
    up = tl.zeros((rows,), tl.float32)
    for start in range(0, hidden, columns):
        column = start + tl.arange(0, columns)
        x = tl.load(x_ptr + (slot // k) * hidden + column).to(tl.float32)
        at = row[:, None] * hidden + column[None, :]
        gate += tl.sum(tl.load(w + at).to(tl.float32) * x[None, :], 1)
        up += tl.sum(tl.load(w + inner * hidden + at).to(tl.float32) * x[None, :], 1)
    dtype = act_ptr.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    tl.store(act_ptr + slot * inner + row, activated.to(dtype))


@triton.jit
def _down(
    act_ptr,
    w_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    hidden: tl.constexpr,
    inner: tl.constexpr,
    k: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """The weighted sum of w2 over the k experts of one token."""
    token = tl.program_id(1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    total = tl.zeros((rows,), tl.float32)
    for choice in range(k):
        slot = token * k + choice
        w = w_ptr + tl.load(ids_ptr + slot).to(tl.int64) * (hidden * inner)
        one = tl.zeros((rows,), tl.float32)
        for start in range(0, inner, columns):
            column = start + tl.arange(0, columns)
            act = tl.load(act_ptr + slot * inner + column).to(tl.float32)
            at = row[:, None] * inner + column[None, :]
            one += tl.sum(tl.load(w + at).to(tl.float32) * act[None, :], 1)
        total += one.to(out_ptr.dtype.element_ty).to(tl.float32) * tl.load(weights_ptr + slot)
    tl.store(out_ptr + token * hidden + row, total.to(out_ptr.dtype.element_ty))


@triton_op("mixlens::experts", mutates_args={})
def experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Experts of x [T, H], given gate_up [E, 2I, H], down [E, H, I], and ids and float32 weights [T, k]."""
    (tokens, hidden), inner, k = x.shape, down.shape[2], ids.shape[1]
    wide, deep = min(UP_COLUMNS, hidden & -hidden), min(DOWN_COLUMNS, inner & -inner)
    act = torch.empty((tokens * k, inner), device=x.device, dtype=x.dtype)
    out = torch.empty_like(x)
    grid = (inner // UP_ROWS, tokens * k)
    wrap_triton(_gate_and_up)[grid](x, gate_up, ids, act, hidden, inner, k, UP_ROWS, wide, num_warps=4)
    grid = (hidden // DOWN_ROWS, tokens)
    wrap_triton(_down)[grid](act, down, ids, weights, out, hidden, inner, k, DOWN_ROWS, deep, num_warps=4)
    return out


def experts_forward(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`experts` as an implementation for ``ALL_EXPERTS_FUNCTIONS``."""
    return experts(
        hidden.contiguous(), self.gate_up_proj, self.down_proj, ids.contiguous(), weights.float().contiguous()
    )
