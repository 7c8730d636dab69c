"""Linears whose weights are quantized, one scheme at a time."""

from __future__ import annotations

from typing import Any

import torch


def dequantized(linear: Any) -> torch.Tensor:
    """The weight [out, in] that a Linear computes with."""
    return linear.weight.detach()
