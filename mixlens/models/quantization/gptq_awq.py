"""GPTQ and AWQ checkpoints: their packed integers, read into Linears of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mixlens.errors import ModelError
from mixlens.models.quantization.grouped_linear import BITS, GroupedLinear

METHODS = ("gptq", "awq")
# AWQ puts eight numbers into an int32 in the order 0 2 4 6 1 3 5 7; number i is found at place _AWQ[i].
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class PackedFormat:
    """How a checkpoint holds its quantized weights.

    method        gptq or awq
    modules       names of the Linears that are packed
    first_format  GPTQ's, with zeros less one
    symmetric     whether the config says so: then every zero is half of the range
    """

    method: str
    bits: int
    modules: frozenset[str]
    first_format: bool = False
    symmetric: bool = False

    def holds(self, module: str) -> bool:
        return module in self.modules

    def parts(self, _module: str) -> tuple[str, ...]:
        """What stands in the checkpoint for one Linear."""
        return ("qweight", "qzeros", "scales", *(("g_idx",) if self.method == "gptq" else ()))

    def read(self, name: str, read: Callable[[str], torch.Tensor]) -> GroupedLinear:
        """The Linear of this name; `read` gives a tensor of the checkpoint."""
        stored, zeros, scales = (read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        scheme = f"{self.method}{self.bits}"
        if self.method == "awq":
            number, zero = _awq(stored).T, _awq(zeros).T
            return GroupedLinear(scheme, self.bits, number, scale=scales.T, zero=zero)
        number = lowest_first(stored.T, self.bits)
        zero = _gptq_zeros(zeros, self).T
        group = read(f"{name}.g_idx").long()
        _check_contents(name, self, zero, number.shape[1], len(group))
        if len(group) % len(scales):
            raise ModelError(
                f"Cannot read {name} from a GPTQ checkpoint: its {len(group)} inputs lie in {len(scales)} groups of "
                "different sizes. Quantize the original with a group size that divides every row.",
                argument=name,
                value=len(scales),
            )
        number, order = sort_by_group(number, group)
        return GroupedLinear(scheme, self.bits, number, scale=scales.T, zero=zero, order=order)


def packed_format(name: str, quantization: dict[str, Any], tensors: list[str]) -> PackedFormat:
    """The format from a config's `quantization_config` and the names of a checkpoint's tensors.

    Raises ModelError for what cannot be read.
    """
    method = str(quantization["quant_method"]).lower()
    bits = int(quantization.get("bits", quantization.get("w_bit", 4)))
    modules = frozenset(tensor.removesuffix(".qweight") for tensor in tensors if tensor.endswith(".qweight"))
    version = str(quantization.get("checkpoint_format", quantization.get("version", ""))).lower()
    known = ("", "gptq", "gptq_v2", "gemm")
    if version not in known or bits not in BITS or (method == "awq" and bits != 4) or not modules:
        held = f"format {version or method}" if modules else "no packed weights (qweight)"
        raise ModelError(
            f"Cannot load {name}: it is quantized by {method} to {bits} bits, with {held}. mixlens reads GPTQ of 2, "
            "3, 4 and 8 bits and AWQ of 4 bits (GEMM): get such a checkpoint, or quantize the original.",
            argument="quantization",
            value=(method, bits),
        )
    symmetric = method == "gptq" and quantization.get("sym") is True
    return PackedFormat(method, bits, modules, method == "gptq" and version != "gptq_v2", symmetric)


def sort_by_group(number: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The columns of `number` sorted by the group [in] of each input, and the `order` of a GroupedLinear."""
    order = torch.argsort(group, stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return number, None
    return number[:, order], torch.argsort(order)


def _check_contents(name: str, form: PackedFormat, zero: torch.Tensor, unpacked: int, inputs: int) -> None:
    """Raises ModelError where the tensors contradict what the config says of them."""
    if unpacked != inputs:
        raise ModelError(
            f"Cannot read {name} from a GPTQ checkpoint: its config says {form.bits} bits, by which qweight holds "
            f"{unpacked} inputs, and g_idx has {inputs}. The module has other bits than the config says; get a "
            "checkpoint with one number of bits, or quantize the original.",
            argument=name,
            value=(unpacked, inputs),
        )
    half, found = 2 ** (form.bits - 1), sorted(set(zero.unique().tolist()))
    if found != [half] and (form.symmetric or found in ([half - 1], [half + 1])):
        said = "its config says symmetric" if form.symmetric else "all its zeros are the same, as symmetric ones are"
        label = (
            "gptq, whose zeros are stored less one" if form.first_format else "gptq_v2, whose zeros are stored as is"
        )
        raise ModelError(
            f"Cannot read {name} from a GPTQ checkpoint: {said}, so that every zero is {half}, and {label}; the zeros "
            f"come out as {found[:4]}. One of the two labels is wrong: correct checkpoint_format in config.json after "
            "asking whoever made it.",
            argument=name,
            value=found[:4],
        )


def _gptq_zeros(stored: torch.Tensor, form: PackedFormat) -> torch.Tensor:
    """uint8 [groups, out]. The first format took one from each zero, by whole int32, so that a zero of 0 borrows."""
    if not form.first_format:
        return lowest_first(stored, form.bits)
    if 32 % form.bits:
        return (lowest_first(stored, form.bits) + 1) & 2**form.bits - 1
    return lowest_first(stored + sum(1 << shift for shift in range(0, 31, form.bits)), form.bits)


def lowest_first(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, m * 32 / bits] from int32 [n, m]: the numbers follow each other from the lowest bit on."""
    if 32 % bits:
        stream = (stored[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
        each = stream.to(torch.uint8).reshape(len(stored), -1, bits)
        return (each << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    number = (stored[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32)) & (2**bits - 1)
    return number.to(torch.uint8).flatten(-2)


def _awq(stored: torch.Tensor) -> torch.Tensor:
    """uint8 [n, m * 8] from int32 [n, m]."""
    number = lowest_first(stored, 4).reshape(len(stored), -1, 8)
    return number[..., list(_AWQ)].flatten(-2)
