"""A Linear whose weight is whole numbers of few bits, packed without gaps, with a scale and a zero a group."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

BITS = (2, 3, 4, 8)


class GroupedLinear(nn.Module):
    """weight[o, i] = (number[o, i] - zero[o, g]) * scale[o, g], where g is the group of input i.

    scheme  what made the numbers, as the audit names it: "hqq2", "int4wo", "gptq4" ...
    number  uint8 [out, in] below 2 ** bits
    scale   [out, groups]
    zero    [out, groups], of any dtype
    order   int64 [in], where each input stands once inputs are sorted by group; None where they already are

    The weight is made anew for every forward, in the dtype of the input.
    """

    number: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    order: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        scheme: str,
        bits: int,
        number: torch.Tensor,
        *,
        scale: torch.Tensor,
        zero: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.bits = scheme, bits
        self.out_features, self.in_features = number.shape
        self.register_buffer("number", pack(number, bits))
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", zero.contiguous())
        self.register_buffer("order", None if order is None else order.to(torch.int32))
        self.register_parameter("bias", None)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in]."""
        weight = grouped_weight(self.number, self.scale, self.zero, self.bits, dtype)
        return weight if self.order is None else weight[:, self.order]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.dequantized(hidden.dtype), self.bias)

    def extra_repr(self) -> str:
        groups = self.scale.shape[1]
        return f"{self.in_features}, {self.out_features}, {self.scheme}, {self.bits} bits, {groups} groups"


def grouped_weight(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [..., out, in] of packed numbers [..., out, in / 8, bits], scales and zeros [..., out, groups]."""
    scale, zero = (values.to(dtype)[..., None] for values in (scale, zero))
    number = unpack(packed, bits).reshape(*scale.shape[:-1], -1)
    return ((number - zero) * scale).flatten(-2)


def pack(number: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [out, in / 8, bits]: eight numbers of uint8 [out, in] in as many bytes as each has bits, lowest first."""
    if bits == 8:
        return number[..., None].contiguous()
    eight = number.reshape(len(number), -1, 8).to(torch.int64)
    word = (eight << (bits * torch.arange(8, device=number.device))).sum(-1, keepdim=True)
    return ((word >> (8 * torch.arange(bits, device=number.device))) & 255).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers [out, in] that `pack` packed, int32 or uint8."""
    if bits == 8:
        return packed[..., 0]
    word = packed[..., 0].to(torch.int32)
    for byte in range(1, bits):  # the shift drops what the sign would get
        word |= packed[..., byte].to(torch.int32) << (8 * byte)
    eight = (word[..., None] >> (bits * torch.arange(8, device=packed.device, dtype=torch.int32))) & (2**bits - 1)
    return eight.flatten(-2)
