"""Models with some of their experts alone: what stays of a layer, of its router, and the numbers that count them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mixlens.errors import ModelError
from mixlens.models.layout import (
    MoeLayer,
    config_of,
    moe_layers,
    n_experts,
    refuse_sharded,
    refuse_without_rule,
)

# Where modules and configs of the families count their experts.
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def refuse_whole(model: Any, what: str, *, routers: bool) -> None:
    """Raises ModelError for a model whose experts, or `routers`, cannot be taken apart."""
    refuse_sharded(model, what)
    count = n_experts(model)
    for layer in moe_layers(model):
        groups = getattr(layer.gate, "num_group", None) or 1
        if layer.rule is None and routers:
            refuse_without_rule(layer, what)
        if layer.family.rule is not None and layer.family.rule.groups is not None and groups > 1 and routers:
            raise ModelError(
                f"Cannot {what} of layer {layer.index}: its router chooses within {groups} groups of equal size, which "
                "would no longer be equal. Put means in the place of experts (means=), or forbid them with "
                "ml.edits.forbid.",
                argument="groups",
                value=groups,
            )
        weights = [*layer.experts.parameters()]
        rows = [layer.gate.weight] if isinstance(getattr(layer.gate, "weight", None), torch.Tensor) else []
        known = layer.routed and layer.moe.experts is layer.experts and hasattr(layer.experts, "down_proj")
        plain = all(len(w) == count and w.is_floating_point() and not w.is_meta for w in (*weights, *rows))
        if not (known and plain and (rows or not routers)):
            raise ModelError(
                f"Cannot {what} of layer {layer.index}: its {type(layer.experts).__name__} is quantized, offloaded, "
                "under an adapter, or holds its experts in a layout that mixlens does not know. Prune the original, "
                'loaded whole by ml.load(..., device_map="cpu") and with adapters merged; save it, and quantize when '
                "you load it again.",
                argument="experts",
                value=type(layer.experts).__name__,
            )


def keep_experts(layer: MoeLayer, own: torch.Tensor) -> None:
    """Cut the weights of a layer's experts down to those of these numbers, in place."""
    experts: Any = layer.experts
    for name in list(experts._parameters):
        _cut(experts, name, own, dim=0)
    experts.num_experts = len(own)


def keep_rows(layer: MoeLayer, own: torch.Tensor) -> None:
    """Cut a layer's router down to the experts of these numbers, in place."""
    for name in list(layer.gate._parameters):
        _cut(layer.gate, name, own, dim=0)
    for place, name in _bias_of(layer):
        _cut(place, name, own, dim=-1)


def count_anew(model: nn.Module, before: int, after: int) -> None:
    """Write the number of experts where the config and modules of a model have it."""
    for module in model.modules():
        for name in _COUNTS:
            if vars(module).get(name) == before:
                setattr(module, name, after)
    config = config_of(model)
    for name in _COUNTS:
        if getattr(config, name, None) == before:
            setattr(config, name, after)


def _bias_of(layer: MoeLayer) -> list[tuple[Any, str]]:
    """Where the bias that ranks experts is a tensor of its own: the module that holds it, and its name there."""
    path, _, name = ((layer.rule and layer.rule.rule.bias) or "").rpartition(".")
    for place in (layer.gate, layer.moe):
        holder = getattr(place, path, None) if path else place
        if isinstance(getattr(holder, name, None) if name else None, torch.Tensor):
            return [] if name in layer.gate._parameters and not path else [(holder, name)]
    return []


def _cut(module: Any, name: str, own: torch.Tensor, *, dim: int) -> None:
    """Of a parameter or a buffer, what belongs to the experts kept."""
    store = module._parameters if name in module._parameters else module._buffers
    tensor = store[name]
    if tensor is not None:
        cut = tensor.detach().index_select(dim, own.to(tensor.device))
        store[name] = nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
