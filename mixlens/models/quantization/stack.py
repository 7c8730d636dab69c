"""Weights of many Linears of one shape and scheme in one tensor, for compiled code to choose among them by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixlens.models.quantization.grouped_linear import GroupedLinear, grouped_weight

_Part = tuple[Any, str]  # an object, and its attribute that holds a tensor
_Multiply = Callable[[torch.Tensor], torch.Tensor]  # what a weight makes of the input
# What a Linear of the scheme gives, by the dtype of its input and the tensors that hold its weight.
_Product = Callable[..., torch.Tensor]


class Stack:
    """Numbers, scales and whatever else a scheme keeps, [expert, ...] each; the Linears then hold parts of these.

    No byte is held twice, but for those of one matrix of one layer while they are put together.
    """

    def __init__(self, linears: Sequence[Any], places: Sequence[Sequence[_Part]], product: _Product) -> None:
        self._places, self._product = places, product
        self._tensors = []
        for part in zip(*places, strict=True):
            together = torch.stack([getattr(held, name).detach() for held, name in part])
            for (held, name), own in zip(part, together, strict=True):
                _put(held, name, own)
            self._tensors.append(together)
        biases = [linear.bias for linear in linears]
        self._bias = None if biases[0] is None else torch.stack([bias.detach() for bias in biases])

    @classmethod
    def of(cls, linears: Sequence[Any]) -> Stack | None:
        """The stack of Linears; None for schemes whose weights cannot be computed from a choice of rows."""
        found = [_parts(linear) for linear in linears]
        if any(parts is None for parts in found) or len({linear.out_features for linear in linears}) > 1:
            return None
        return cls(linears, [parts[0] for parts in found if parts], found[0][1])  # type: ignore[index]

    def product(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[n, out] from inputs [n, in], each times the weight of its own number."""

        dtype = _computed_in(x)

        def multiply(weight: torch.Tensor) -> torch.Tensor:
            return torch.bmm(weight.to(dtype), x.to(dtype).unsqueeze(-1)).squeeze(-1)

        made = self._product(multiply, dtype, *(tensor[ids] for tensor in self._tensors))
        return (made if self._bias is None else made + self._bias[ids].to(made.dtype)).to(x.dtype)

    def take_apart(self) -> None:
        """Give every Linear tensors of its own again."""
        for part in zip(*self._places, strict=True):
            for held, name in part:
                _put(held, name, getattr(held, name).detach().clone())
        self._tensors = []


class OpenLinear(nn.Module):
    """A quantized Linear as plain tensors and the sum that makes its weight, which compiled code can see into."""

    def __init__(self, linear: Any, parts: Sequence[_Part], product: _Product) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._names = [name for _, name in parts]
        for held, name in parts:
            self.register_buffer(f"_{name}", getattr(held, name).detach(), persistent=False)
        self._product, self.bias = product, linear.bias

    @classmethod
    def of(cls, linear: Any) -> OpenLinear | None:
        """The same Linear, for schemes that are known; None for others, and for what is plain already."""
        parts = None if type(getattr(linear, "weight", None)) is nn.Parameter else _parts(linear)
        return None if parts is None else cls(linear, *parts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        held = [getattr(self, f"_{name}") for name in self._names]
        dtype = _computed_in(hidden)
        made = self._product(partial(F.linear, hidden.to(dtype)), dtype, *held)
        return (made if self.bias is None else made + self.bias.to(made.dtype)).to(hidden.dtype)


def _put(held: Any, name: str, value: torch.Tensor) -> None:
    if isinstance(getattr(held, name), torch.nn.Parameter):
        getattr(held, name).data = value
    else:
        setattr(held, name, value)


def _parts(linear: Any) -> tuple[list[_Part], _Product] | None:
    """Where a Linear holds its weight, and how it is multiplied, given these or choices of several [n, ...]."""
    if isinstance(linear, GroupedLinear):
        if linear.order is not None:
            return None
        return [(linear, name) for name in ("number", "scale", "zero")], partial(_of_groups, linear.bits)
    held: Any = getattr(linear, "weight", None)
    kind = type(held).__name__
    if kind == "Int8Tensor" and held.act_quant_kwargs is None and held.act_pre_scale is None:
        by_row = held.block_size[-1] == linear.in_features
        return ([(held, "qdata"), (held, "scale")], _of_rows) if by_row else None
    if kind == "Params4bit" and getattr(held, "quant_state", None) is not None:
        state = held.quant_state
        whole = not state.nested and linear.in_features % state.blocksize == 0
        product = partial(_of_blocks, linear.out_features)
        return ([(held, "data"), (state, "absmax"), (state, "code")], product) if whole else None
    return ([(linear, "weight")], _plain) if kind == "Parameter" and held.is_floating_point() else None


def _plain(multiply: _Multiply, _dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return multiply(weight)


def _of_rows(multiply: _Multiply, dtype: torch.dtype, number: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return multiply(number.to(dtype)) * scale.to(dtype).reshape(number.shape[:-1])


def _computed_in(x: torch.Tensor) -> torch.dtype:
    """The dtype of products with x: CPUs turn whole numbers into float32 at once, and into bfloat16 one by one."""
    return torch.float32 if torch.compiler.is_compiling() and x.device.type == "cpu" else x.dtype


def _of_groups(
    bits: int, multiply: _Multiply, dtype: torch.dtype, number: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    return multiply(grouped_weight(number, scale, zero, bits, dtype))


def _of_blocks(
    out: int, multiply: _Multiply, dtype: torch.dtype, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor
) -> torch.Tensor:
    """Of bitsandbytes' nf4 and fp4: two numbers a byte, the first in its upper half, and one scale a block."""
    number = torch.stack([packed >> 4, packed & 15], -1).int().reshape(*absmax.shape, -1)
    value = code.reshape(-1, 16)[0][number] * absmax.unsqueeze(-1)
    return multiply(value.to(dtype).reshape(*absmax.shape[:-1], out, -1))
