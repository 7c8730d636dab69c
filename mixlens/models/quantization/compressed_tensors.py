"""compressed-tensors checkpoints: whole numbers of few bits, packed into int32, read into Linears of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixlens.errors import ModelError
from mixlens.models.quantization.gptq_awq import lowest_first, sort_by_group
from mixlens.models.quantization.grouped_linear import GroupedLinear

_BITS = (2, 4, 8)  # those that divide a word; writers differ in how they pack the others
_PART = ".weight_packed"


@dataclass(frozen=True)
class CompressedFormat:
    """How a compressed-tensors checkpoint holds its quantized weights.

    bits     those that the config allows, the most first
    parts_of {name of a packed Linear: what stands for it in the checkpoint}
    """

    config_bits: tuple[int, ...]
    parts_of: Mapping[str, tuple[str, ...]]

    @property
    def bits(self) -> int:
        return self.config_bits[0]

    def holds(self, module: str) -> bool:
        return module in self.parts_of

    def parts(self, module: str) -> tuple[str, ...]:
        return self.parts_of[module]

    def read(self, name: str, read: Callable[[str], torch.Tensor]) -> GroupedLinear:
        """The Linear of this name; `read` gives a tensor of the checkpoint."""
        stored = {part: read(f"{name}.{part}") for part in self.parts(name)}
        rows, inputs = stored["weight_shape"].tolist()
        words = stored["weight_packed"]
        bits = next((bits for bits in _BITS if words.shape[1] == -(-inputs * bits // 32)), 0)
        if bits not in self.config_bits or len(words) != rows:
            raise ModelError(
                f"Cannot read {name} from a compressed-tensors checkpoint: weight_shape says {rows} x {inputs}, its "
                f"packed weight has {list(words.shape)} words, and config.json says {self.config_bits} bits. They "
                "contradict each other; get another copy of the checkpoint, or quantize the original.",
                argument=name,
                value=(list(words.shape), [rows, inputs]),
            )
        number = lowest_first(words, bits)[:, :inputs]
        scale = stored["weight_scale"].reshape(-1, stored["weight_scale"].shape[-1]).expand(rows, -1)
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
        if "weight_zero_point" in stored:
            zero = lowest_first(stored["weight_zero_point"].T, bits).T[:rows]
        if inputs % scale.shape[1] or zero.shape != scale.shape:
            raise ModelError(
                f"Cannot read {name} from a compressed-tensors checkpoint: {inputs} inputs do not lie in "
                f"{scale.shape[1]} groups of scales and {zero.shape[1]} of zeros. Quantize the original with a group "
                "size that divides every row.",
                argument=name,
                value=(list(scale.shape), list(zero.shape)),
            )
        order = None
        if "weight_g_idx" in stored:
            number, order = sort_by_group(number, stored["weight_g_idx"].long())
        return GroupedLinear(f"int{bits}", bits, number, scale=scale, zero=zero, order=order)


def compressed_format(name: str, quantization: Mapping[str, Any], tensors: Sequence[str]) -> CompressedFormat:
    """The format from a config's `quantization_config` and the names of a checkpoint's tensors.

    Raises ModelError for what cannot be read, such as activations that are quantized too.
    """
    groups = [dict(group) for group in dict(quantization.get("config_groups") or {}).values()]
    weights = [dict(group.get("weights") or {}) for group in groups]
    packed = {tensor.removesuffix(_PART) for tensor in tensors if tensor.endswith(_PART)}
    formats = {str(group.get("format") or quantization.get("format")) for group in groups}
    why = None
    if formats != {"pack-quantized"} or not packed:
        why = f"its weights are stored as {', '.join(sorted(formats)) or 'nothing it names'}"
    elif any(group.get("input_activations") or group.get("output_activations") for group in groups):
        why = "its activations are quantized too"
    elif any(one.get("type") != "int" or one.get("num_bits") not in _BITS for one in weights):
        why = "its weights are " + ", ".join(sorted({f"{one.get('type')}{one.get('num_bits')}" for one in weights}))
    elif held := [key for key in ("kv_cache_scheme", "sparsity_config", "transform_config") if quantization.get(key)]:
        why = f"it has a {held[0]}"
    if why is not None:
        raise ModelError(
            f"Cannot load {name}: it is quantized by compressed-tensors, and {why}. mixlens reads packed whole numbers "
            "of 2, 4 and 8 bits (w4a16, w8a16): get such a checkpoint, or load the original with quantization=.",
            argument="quantization",
            value=why,
        )
    parts = ("weight_packed", "weight_scale", "weight_shape")
    present = set(tensors)
    return CompressedFormat(
        tuple(sorted({int(one["num_bits"]) for one in weights}, reverse=True)),
        {
            module: parts
            + tuple(part for part in ("weight_zero_point", "weight_g_idx") if f"{module}.{part}" in present)
            for module in packed
        },
    )
