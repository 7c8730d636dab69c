"""Decoding as one compiled graph that reads each weight once, where transformers would copy, sort and repeat.

A step of one token reads every weight for a single row, so its time is that of memory. Inductor calls a library for
each product with one row, which on a CPU costs more than the reading; as a sum, it fuses with the choice of experts
before it and with what follows. On CUDA inductor does the same itself under `coordinate_descent_tuning`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, CompileConfig
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mixlens.models.layout import decoder_of, moe_layers
from mixlens.models.quantization.stack import OpenLinear
from mixlens.models.quantization.unfuse import Expert, is_unfused

AUTO = "auto"
COMPILING_S = 60.0  # twice what compiling took on two CPU cores, whatever the number of layers
_GROUPED = "grouped_heads"
_FEW = 64  # experts up to which two maxima are faster than a sort
aten = torch.ops.aten


@dataclass(frozen=True)
class Choice:
    """Which way a load decodes, and the seconds by which it was chosen.

    eager_step_s     a step as transformers decodes
    left_s           all steps that are still to come, at that rate
    compiled_step_s  a step through the compiled graph; None where it was not tried
    compile_s        what compiling took, which is in no other figure
    fault            why compiled code could not be made
    """

    eager_step_s: float | None
    left_s: float = 0.0
    compiled_step_s: float | None = None
    compile_s: float | None = None
    fault: str = ""

    @property
    def worth_compiling(self) -> bool:
        return self.left_s > COMPILING_S

    @property
    def compiled(self) -> bool:
        tried = self.compiled_step_s is not None and self.eager_step_s is not None
        return tried and self.compiled_step_s < self.eager_step_s  # type: ignore[operator]

    def __str__(self) -> str:
        if self.eager_step_s is None:
            return "decode not compiled: no call was timed before"
        eager = f"{1e3 * self.eager_step_s:.3g} ms a step before compiling"
        if self.fault:
            return f"decode not compiled ({eager}): {self.fault}"
        if self.compiled_step_s is None:
            return f"decode not compiled ({eager}): all of it takes {self.left_s:.3g} s, and compiling about a minute"
        how = "decode compiled" if self.compiled else "decode not compiled"
        return f"{how}: {1e3 * self.compiled_step_s:.3g} ms a step, {eager}; compiling took {self.compile_s:.3g} s"


@contextmanager
def compiled_decoding(model: Any) -> Iterator[Any]:
    """Let `generate` decode through one compiled graph, in a static cache.

    The first call compiles, which takes up to a minute, for one batch size and one longest sequence; calls of other
    sizes compile again. Needs a C++ compiler on a CPU, and Triton on CUDA. Prompts are read as before. Sums are added
    in another order than transformers', so that tokens may differ from those of the model as it is where rounding
    decides. A CompiledRecorder records inside the graph. Entering resets torch.compile for the process.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model from `ml.load`; as it was before, afterwards.

    Yields
    ------
    transformers.PreTrainedModel

    Examples
    --------
    >>> with ml.compiled_decoding(model) as fast:
    ...     fast.generation_config.cache_implementation
    'static'
    """
    with ExitStack() as stack:
        stack.callback(setattr, model, "generation_config", model.generation_config)
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.cache_implementation = "static"
        model.generation_config.compile_config = compile_config()
        stack.enter_context(one_graph(model))
        yield model


@contextmanager
def one_graph(model: Any) -> Iterator[None]:
    """Experts and attention in the form that `compile_config` compiles best; as they were, afterwards."""
    register()
    torch.compiler.reset()  # guards on modules are left out, so that nothing else would tell older code from this
    with ExitStack() as stack:
        for set_to, before, wanted in (
            (model.set_experts_implementation, model.config._experts_implementation, AUTO),
            (model.set_attn_implementation, model.config._attn_implementation, _GROUPED),
        ):
            stack.callback(set_to, before)
            set_to(wanted)
        for layer in moe_layers(model):
            experts: Any = layer.experts
            if is_unfused(experts):
                stack.enter_context(experts.stacked())
        for parent in [module for module in model.modules() if not isinstance(module, Expert)]:
            for name, linear in list(parent.named_children()):
                if (plain := OpenLinear.of(linear)) is not None:
                    stack.callback(setattr, parent, name, linear)
                    setattr(parent, name, plain)
        for kind in {type(block) for block in decoder_of(model).layers}:  # compiled once, for all layers of a kind
            stack.callback(setattr, kind, "forward", kind.forward)
            kind.forward = torch.compiler.nested_compile_region(kind.forward)
        yield


def compile_config() -> Any:
    """How generate compiles its decode."""
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    config: Any = CompileConfig(fullgraph=True, dynamic=False, backend=_backend, mode=None, options=options)  # type: ignore[arg-type]
    config._compile_all_devices = True
    return config


def register() -> None:
    """Make the implementations known to transformers."""
    if AUTO not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(AUTO, _experts)
        AttentionInterface.register(_GROUPED, _attention)
        AttentionMaskInterface.register(_GROUPED, sdpa_mask)


def _experts(experts: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Experts as they are fastest for so many tokens on their device."""
    compiling, on_cpu = torch.compiler.is_compiling(), hidden.device.type == "cpu"
    if is_unfused(experts):
        return (experts.gathered if compiling and experts.is_stacked else experts.loop)(hidden, ids, weights)
    if len(hidden) > 1:
        return grouped_mm_experts_forward(experts, hidden, ids, weights)
    if not on_cpu and (kernel := _kernel_for(experts)) is not None:
        return kernel(experts, hidden, ids, weights)
    if compiling or not on_cpu:
        return batched_mm_experts_forward(experts, hidden, ids, weights)
    return grouped_mm_experts_forward(experts, hidden, ids, weights)


def _kernel_for(experts: Any) -> Callable[..., torch.Tensor] | None:
    """The Triton kernel, for experts that it knows."""
    plain = experts.has_gate and not (experts.has_bias or experts.is_transposed or experts.has_post_expert_norm)
    if not plain or not isinstance(experts.act_fn, torch.nn.SiLU) or not experts.gate_up_proj.is_cuda:
        return None
    try:
        from mixlens.models.decode_kernels import experts_forward
    except ImportError:
        return None
    return experts_forward


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token a row that reads keys and values of each group of heads once, without repeating them.

    Longer inputs, and attention of kinds that need more than a mask, go through transformers' own.
    """
    rows, heads, columns, width = query.shape
    if columns > 1 or options.get("s_aux") is not None or options.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    groups = key.shape[1]
    grouped = query.view(rows, groups, heads // groups, width)
    scores = _product(grouped, key.transpose(-1, -2)).float() * (scaling or width**-0.5)
    if mask is not None:
        seen = mask[:, :, :, : key.shape[2]]
        scores = scores.masked_fill(~seen, float("-inf")) if mask.dtype == torch.bool else scores + seen.float()
    read = _product(torch.softmax(scores, -1).to(value.dtype), value)
    return read.reshape(rows, 1, heads, value.shape[-1]), None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right; on a CPU as a sum, which is compiled without a call."""
    if left.device.type != "cpu" or not torch.compiler.is_compiling():
        return left @ right
    return (_in_memory(left.float()).unsqueeze(-1) * right.unsqueeze(-3).float()).sum(-2).to(left.dtype)


# ---------------------------------------------------------------------- compiling


def _backend(graph: Any, inputs: Any, **_options: Any) -> Any:
    """Inductor, with products of one row as sums and the choice of two experts as two maxima."""
    from torch._functorch import config as functorch
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    known = select_decomp_table()
    own = {
        aten.mm.default: _mm,
        aten.bmm.default: _bmm,
        aten.topk.default: _topk,
    }
    table = {**known, **{op: _first(decomposed, known.get(op)) for op, decomposed in own.items()}}
    patches = {"coordinate_descent_tuning": True, "triton.cudagraphs": torch.cuda.is_available()}
    # The cache of autograd's graphs tells graphs apart before they are decomposed; inductor's own, afterwards.
    with functorch.patch(enable_autograd_cache=False):  # type: ignore[attr-defined]
        return compile_fx(graph, inputs, config_patches=patches, decompositions=table)


def _first(own: Callable[..., Any], known: Callable[..., Any] | None) -> Callable[..., Any]:
    def decomposed(*args: Any, **options: Any) -> Any:
        found = own(*args, **options)
        return known(*args, **options) if found is NotImplemented and known is not None else found

    return decomposed


def _mm(left: torch.Tensor, right: torch.Tensor, **_options: Any) -> Any:
    if left.device.type != "cpu" or left.shape[0] != 1 or not left.is_floating_point():
        return NotImplemented
    return (right.t().float() * _in_memory(left.float())).sum(-1).to(left.dtype)[None]


def _bmm(left: torch.Tensor, right: torch.Tensor, **_options: Any) -> Any:
    if left.device.type != "cpu" or right.shape[2] != 1:
        return NotImplemented
    vector = _in_memory(right.squeeze(2).float())[:, None]
    return (left.float() * vector).sum(-1, keepdim=True).to(left.dtype)


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """The same values, computed once: inductor would compute them again for every row of the weight."""
    return torch.as_strided(plain := x.clone(memory_format=torch.contiguous_format), plain.shape, plain.stride())


def _topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if k != 2 or not largest or dim not in (-1, x.ndim - 1) or not 2 <= x.shape[-1] <= _FEW:
        return NotImplemented
    first, at_first = x.max(-1, keepdim=True)
    place = torch.arange(x.shape[-1], device=x.device)
    second, at_second = torch.where(place == at_first, float("-inf"), x).max(-1, keepdim=True)
    return torch.cat([first, second], -1), torch.cat([at_first, at_second], -1)
