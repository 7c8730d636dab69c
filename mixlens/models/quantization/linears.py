"""Linears whose weights are quantized, one maker for each scheme, and back to the weights they compute with."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mixlens.errors import ModelError
from mixlens.models.quantization.grouped_linear import GroupedLinear

_OUTLIER = 6.0  # LLM.int8(): inputs above it are computed in float16, as transformers has it by default


@dataclass(frozen=True)
class Scheme:
    """One way to hold the weight of a Linear.

    group_size  weights that share a scale; None where a scale belongs to a whole row
    bits        that a weight takes without its scales
    """

    name: str
    package: str
    bits: int
    group_size: int | None = None

    @property
    def bits_with_scales(self) -> float:
        """Roughly, for planning where weights fit."""
        return self.bits + (32 / self.group_size if self.group_size else 0.25)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("nf4", "bitsandbytes", 4, 64),
        Scheme("int8", "bitsandbytes", 8),
        Scheme("int8wo", "torchao", 8),
        Scheme("int4wo", "torchao", 4, 128),
        Scheme("fp8", "torchao", 8),
        Scheme("hqq4", "hqq", 4, 64),
        Scheme("hqq3", "hqq", 3, 64),
        Scheme("hqq2", "hqq", 2, 64),
    )
}


def quantize_linear(
    weight: torch.Tensor,
    scheme: Scheme,
    device: torch.device,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> nn.Module:
    """A Linear on `device` that takes and gives `dtype`, from its weight [out, in] and bias [out] on the CPU."""
    made: Any = _MAKERS[scheme.name](weight.to(dtype).contiguous(), scheme, device)
    if bias is not None:
        kernel = made.weight.dtype if hasattr(getattr(made, "weight", None), "__tensor_flatten__") else dtype
        made.bias = nn.Parameter(bias.to(device, kernel), requires_grad=False)
    return made


def require(scheme: Scheme, devices: set[torch.device]) -> None:
    """Raise ModelError when the package of a scheme is missing, or a device cannot compute with it."""
    usable = _usable()
    others = ", ".join(name for name in usable if name != scheme.name)
    if scheme.name not in usable and scheme.name != "fp8":
        raise ModelError(
            f"Cannot quantize to {scheme.name}: the package {scheme.package} is not installed, or fails to import. "
            f"Run: pip install {scheme.package}; "
            f"{f'what works here: {others}' if others else 'no other scheme works here either'}.",
            argument="quantization",
            value=scheme.package,
        )
    if scheme.name == "fp8" and (unable := sorted(str(d) for d in devices if not _computes_fp8(d))):
        raise ModelError(
            f"Cannot quantize to fp8 on {', '.join(unable)}: torchao multiplies in fp8 on GPUs from compute "
            f"capability 8.9 on. What works here: {others}.",
            argument="quantization",
            value=unable,
        )


def dequantized(linear: Any) -> torch.Tensor:
    """The weight [out, in] that a Linear computes with, whoever quantized it."""
    if isinstance(linear, GroupedLinear):
        return linear.dequantized(torch.float32)
    if hasattr(linear.weight, "__tensor_flatten__"):
        return linear.weight.dequantize().detach()  # in this order, for inference mode
    weight = linear.weight.detach()
    if scheme_of_tensor(linear.weight) in ("nf4", "fp4", "int8"):
        if scheme_of_tensor(linear.weight) == "int8":
            absmax = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
            return weight.float() * (absmax.float()[:, None] / 127)
        state = linear.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # repacked at its first forward, on some CPUs
            return linear(torch.eye(linear.in_features, dtype=state.dtype, device=weight.device)).T
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight, state)
    return weight


def scheme_of(module: Any, tensor: torch.Tensor | None = None) -> str:
    """What the audit calls the way a module holds one of its tensors, read from what is there, not from a config."""
    if isinstance(module, GroupedLinear):
        return module.scheme
    if type(module).__name__ == "HQQLinear":
        return f"hqq{module.meta['nbits']}"
    own = getattr(module, "weight", None) if tensor is None else tensor
    return type(module).__name__ if own is None else scheme_of_tensor(own)


def scheme_of_tensor(tensor: torch.Tensor) -> str:
    """nf4, fp4 and int8 of bitsandbytes, int8wo, int4wo and fp8 of torchao, else the dtype."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    kind = type(tensor).__name__
    if kind == "Params4bit" and getattr(tensor, "quant_state", None) is not None:
        return str(tensor.quant_type)  # type: ignore[attr-defined]
    if kind == "Int8Params" and tensor.dtype == torch.int8:
        return "int8"
    if hasattr(tensor, "__tensor_flatten__"):
        for name, start in (("int8wo", "Int8Tensor"), ("int4wo", "Int4"), ("fp8", "Float8")):
            if kind.startswith(start):
                return name
        return kind
    return str(tensor.dtype).removeprefix("torch.")


# ---------------------------------------------------------------------- makers


def _nf4(weight: torch.Tensor, scheme: Scheme, device: torch.device) -> nn.Module:
    bnb = _quietly_imported("bitsandbytes")
    linear = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    linear.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        blocksize=scheme.group_size,
        module=linear,
    ).to(device)
    # Else CPUs with AVX512-BF16 repack the weights at the first forward, compute in bfloat16 whatever the dtype, and
    # fail where the rows are no multiple of 32.
    linear.support_avx512bf16_for_cpu = False
    return linear.eval()


def _int8(weight: torch.Tensor, scheme: Scheme, device: torch.device) -> nn.Module:
    bnb = _quietly_imported("bitsandbytes")
    linear = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=_OUTLIER, device="meta"
    )
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    linear.init_8bit_state()
    return _between(linear.eval(), torch.float16, weight.dtype)


def _torchao(weight: torch.Tensor, scheme: Scheme, device: torch.device) -> nn.Module:
    ao = _quietly_imported("torchao.quantization")
    kernel_dtype = torch.bfloat16
    if scheme.name == "int8wo":
        config, kernel_dtype = ao.Int8WeightOnlyConfig(), weight.dtype
    elif scheme.name == "fp8":
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    elif device.type == "cuda":
        config = ao.Int4WeightOnlyConfig(group_size=scheme.group_size, int4_packing_format="tile_packed_to_4d")
    else:
        return _int4_packed(weight, scheme, device)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device, kernel_dtype), requires_grad=False)
    ao.quantize_(linear, config)
    return _between(linear.eval(), kernel_dtype, weight.dtype)


def _int4_packed(weight: torch.Tensor, scheme: Scheme, device: torch.device) -> nn.Module:
    """torchao's numbers, held by us: away from CUDA it would spend a byte on each."""
    ao = _quietly_imported("torchao.quantization")
    config = ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=ao.PerGroup(scheme.group_size),
        mapping_type=ao.MappingType.ASYMMETRIC,
    )
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device).float(), requires_grad=False)
    ao.quantize_(linear, config)
    held: Any = linear.weight
    return GroupedLinear(
        "int4wo",
        4,
        (held.qdata + 8).to(torch.uint8),
        scale=held.scale.to(torch.float16),
        zero=(held.zero_point + 8).to(torch.uint8),
    )


def _hqq(weight: torch.Tensor, scheme: Scheme, device: torch.device) -> nn.Module:
    from hqq.core.quantize import Quantizer

    number, meta = Quantizer.quantize(
        weight.to(device).float(),
        nbits=scheme.bits,
        group_size=scheme.group_size,  # type: ignore[arg-type]  HQQ schemes have groups
        axis=1,
        round_zero=scheme.bits == 4,
        bitpack=False,
        device=str(device),
    )
    out = len(weight)
    scale, zero = (meta[name].to(torch.float16).reshape(out, -1) for name in ("scale", "zero"))
    return GroupedLinear(scheme.name, scheme.bits, number.to(torch.uint8).reshape(out, -1), scale=scale, zero=zero)


_MAKERS: dict[str, Callable[[torch.Tensor, Scheme, torch.device], nn.Module]] = {
    "nf4": _nf4,
    "int8": _int8,
    "int8wo": _torchao,
    "int4wo": _torchao,
    "fp8": _torchao,
    "hqq4": _hqq,
    "hqq3": _hqq,
    "hqq2": _hqq,
}


# ---------------------------------------------------------------------- what is here


def _usable() -> list[str]:
    """Schemes that work here, on some device."""
    packages: dict[str, bool] = {}
    for scheme in SCHEMES.values():
        if scheme.package not in packages:
            try:
                _quietly_imported(scheme.package)
                packages[scheme.package] = True
            except Exception:  # a package built for another torch fails in ways of its own
                packages[scheme.package] = False
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [
        name
        for name, scheme in SCHEMES.items()
        if packages[scheme.package] and (name != "fp8" or any(_computes_fp8(gpu) for gpu in gpus))
    ]


def _computes_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _quietly_imported(name: str) -> Any:
    """bitsandbytes and torchao write to stderr, on import, of kernels for other hardware."""
    with contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module(name)  # noqa: TID251  an optional package, by the name that its scheme gives


def _between(linear: nn.Module, kernel: torch.dtype, outside: torch.dtype) -> nn.Module:
    """The same Linear with inputs and outputs of another dtype than its kernel's."""
    if kernel != outside:
        linear.register_forward_pre_hook(lambda _module, args: (args[0].to(kernel), *args[1:]))
        linear.register_forward_hook(lambda _module, _args, output: output.to(outside))
    return linear
