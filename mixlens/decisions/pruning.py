"""prune: a model without some of its experts, or with their mean output in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from mixlens.core.text import numbered
from mixlens.errors import BadInput, ModelError
from mixlens.interventions.hooks import edits_of
from mixlens.interventions.where import whole_numbers
from mixlens.models.layout import (
    MoeLayer,
    config_of,
    moe_layers,
    n_experts,
    refuse_sharded,
    refuse_without_rule,
    unwrapped,
)
from mixlens.models.provenance import describe

# Where modules and configs of the families count their experts.
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
RECORD = "mixlens_pruned"


def prune(model: nn.Module, keep: Mapping[int, Iterable[int]] | xr.DataArray, *, means: Any = None) -> Any:
    """Make a model that has some of the experts alone.

    Experts that are not kept are removed with their rows of the router, so that tokens choose the next best; weights
    that do not change are shared with `model`, which stays as it was. With `means` the router stays whole, and what
    is removed puts out its mean: such a model computes here, and no checkpoint of its family can hold it.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model, not quantized, whose routers decide by a rule that mixlens knows.
    keep : Mapping[int, Iterable[int]] or xarray.DataArray
        Experts by layer; or booleans [layer, expert], as `strongest` gives them. Without `means` every layer keeps as
        many as the others, since a config has one number for all.
    means : xarray.DataArray, optional
        Mean outputs [layer, expert, hidden], as ``expert_outputs(...)["mean"]``; layers that `keep` lacks stay whole.

    Returns
    -------
    Any
        A model of the same class. ``config.mixlens_pruned`` says what it was made from, and the numbers that its
        experts had there.

    Raises
    ------
    BadInput
        For unknown layers or experts, different numbers of experts, fewer than a token chooses, and means that are
        missing.
    ModelError
        For a model that is sharded, offloaded, quantized, under edits or adapters, or whose routers are limited to
        groups or follow no known rule.

    Examples
    --------
    >>> smaller = ml.decisions.prune(model, {layer: range(6) for layer in range(8)})
    >>> smaller.config.num_local_experts, model.config.num_local_experts
    (6, 8)
    """
    inner: Any = unwrapped(model)
    layers, count = moe_layers(inner), n_experts(inner)
    _refuse(inner, layers, whole=means is not None)
    kept = _kept(layers, keep, count, whole=means is not None)
    smaller = copy.deepcopy(inner, {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())})
    for layer in moe_layers(smaller):
        experts: Any = layer.experts
        own = torch.tensor(kept[layer.index], device=experts.down_proj.device)
        if len(own) == count:
            continue
        for name in list(experts._parameters):
            _keep(experts, name, own, dim=0)
        experts.num_experts = len(own)
        if means is not None:
            stand_ins = _means_of(means, layer.index, kept[layer.index], inner)
            layer.moe.experts = WithMeans(experts, own, stand_ins.to(experts.down_proj))
            continue
        for name in list(layer.gate._parameters):
            _keep(layer.gate, name, own, dim=0)
        for place, name in _bias_of(layer):
            _keep(place, name, own, dim=-1)
    if means is None:
        _count_anew(smaller, count, len(next(iter(kept.values()))))
    setattr(smaller.config, RECORD, _record(inner, kept, "removed" if means is None else "mean output"))
    return smaller


class WithMeans(nn.Module):
    """Experts of which some are gone, and put out their mean; called with the numbers that the router knows."""

    place: torch.Tensor
    means: torch.Tensor

    def __init__(self, kept: nn.Module, own: torch.Tensor, means: torch.Tensor) -> None:
        super().__init__()
        self.kept = kept
        place = torch.full((len(means),), -1, device=own.device)
        place[own] = torch.arange(len(own), device=own.device)
        self.register_buffer("place", place)
        self.register_buffer("means", means)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, H] from hidden states [T, H], chosen experts [T, k] and their weights [T, k]."""
        place = self.place[ids]
        gone = place < 0
        output = self.kept(hidden, place.clamp(min=0), weights.masked_fill(gone, 0))
        stand_in = weights.masked_fill(~gone, 0)[..., None] * self.means[ids]
        return output + stand_in.sum(1).to(output.dtype)


def _refuse(model: Any, layers: list[MoeLayer], *, whole: bool) -> None:
    """Raises ModelError for a model that cannot be taken apart; `whole` routers may decide as they like."""
    refuse_sharded(model, "prune experts")
    if active := edits_of(model):
        raise ModelError(
            f"Cannot prune a model under edits ({', '.join(active)}): they would stay in the copy. Prune it outside "
            "the edit.",
            argument="model",
            value=active,
        )
    count = n_experts(model)
    for layer in layers:
        groups = getattr(layer.gate, "num_group", None) or 1
        if layer.rule is None and not whole:
            refuse_without_rule(layer, "prune experts")
        if layer.family.rule is not None and layer.family.rule.groups is not None and groups > 1 and not whole:
            raise ModelError(
                f"Cannot prune experts of layer {layer.index}: its router chooses within {groups} groups of equal "
                "size, which would no longer be equal. Put means in the place of experts (means=), or forbid them "
                "with ml.edits.forbid.",
                argument="groups",
                value=groups,
            )
        weights = [*layer.experts.parameters()]
        rows = [layer.gate.weight] if isinstance(getattr(layer.gate, "weight", None), torch.Tensor) else []
        known = layer.routed and layer.moe.experts is layer.experts and hasattr(layer.experts, "down_proj")
        plain = all(len(w) == count and w.is_floating_point() and not w.is_meta for w in (*weights, *rows))
        if not (known and plain and (rows or whole)):
            raise ModelError(
                f"Cannot prune experts of layer {layer.index}: its {type(layer.experts).__name__} is quantized, "
                "offloaded, under an adapter, or holds its experts in a layout that mixlens does not know. Prune the "
                'original, loaded whole by ml.load(..., device_map="cpu") and with adapters merged; save it, and '
                "quantize when you load it again.",
                argument="experts",
                value=type(layer.experts).__name__,
            )


def _kept(layers: list[MoeLayer], keep: Any, count: int, *, whole: bool) -> dict[int, list[int]]:
    """{layer: experts that stay, ascending} of every layer; `whole` ones may be left out."""
    if isinstance(keep, xr.DataArray) and set(keep.dims) == {"layer", "expert"} and keep.dtype == bool:
        keep = {int(layer): keep.expert.values[keep.sel(layer=layer).values] for layer in keep.layer.values}
    if not isinstance(keep, Mapping):
        raise BadInput(
            f"Cannot prune by a {type(keep).__name__}: expected experts by layer. Pass a mapping such as "
            "{0: [0, 1, 4, 5, 6, 7], ...}, or booleans [layer, expert] as ml.decisions.strongest gives them.",
            argument="keep",
            value=type(keep).__name__,
        )
    known = {layer.index: layer.top_k for layer in layers}
    asked = {layer: sorted(set(whole_numbers(experts))) for layer, experts in keep.items()}
    if unknown := sorted(set(asked) - set(known)):
        raise BadInput(
            f"Cannot prune layers {unknown}: the model has experts in layers {numbered(list(known))}. Pass "
            "numbers among them.",
            argument="keep",
            value=unknown,
        )
    kept = {layer: asked.get(layer, list(range(count))) for layer in known}
    for layer, own in kept.items():
        if own and not 0 <= own[0] <= own[-1] < count:
            raise BadInput(
                f"Cannot keep experts {own} of layer {layer}: it has experts 0 to {count - 1}. Pass numbers among "
                "them.",
                argument="keep",
                value=own,
            )
        if len(own) < (1 if whole else known[layer]):
            raise BadInput(
                f"Cannot keep {len(own)} experts of layer {layer}: every token chooses {known[layer]}. Keep more.",
                argument="keep",
                value=len(own),
            )
    numbers = {len(own) for own in kept.values()}
    if len(numbers) > 1 and not whole:
        raise BadInput(
            f"Cannot keep {min(numbers)} experts in one layer and {max(numbers)} in another: a config has one number "
            "for all layers. Keep equally many of each, or pass means=, which leaves the routers whole.",
            argument="keep",
            value=sorted(numbers),
        )
    if numbers == {count}:
        raise BadInput(
            f"Cannot prune a model and keep all {count} experts of every layer. Keep fewer.",
            argument="keep",
            value=count,
        )
    return kept


def _means_of(means: Any, layer: int, kept: list[int], model: Any) -> torch.Tensor:
    """[expert, hidden] of one layer. Raises BadInput where a removed expert has none."""
    hidden, count = int(config_of(model).hidden_size), n_experts(model)
    if not isinstance(means, xr.DataArray) or set(means.dims) != {"layer", "expert", "hidden"}:
        raise BadInput(
            f"Cannot put a {type(means).__name__} in the place of experts: expected an xarray [layer, expert, "
            'hidden]. Pass ml.experiments.expert_outputs(model, documents)["mean"].',
            argument="means",
            value=type(means).__name__,
        )
    gone = sorted(set(range(count)) - set(kept))
    own = means.transpose("layer", "expert", "hidden")
    there = layer in own.layer.values and own.shape[1:] == (count, hidden)
    values = own.sel(layer=layer).values if there else np.full((count, hidden), np.nan)
    if not np.isfinite(values[gone]).all():
        lacking = [expert for expert in gone if not np.isfinite(values[expert]).all()]
        raise BadInput(
            f"Cannot put means in the place of experts {lacking} of layer {layer}: these means have none for them, of "
            f"{hidden} numbers. Take the means of this model over more text, or keep these experts.",
            argument="means",
            value=(layer, lacking),
        )
    return torch.as_tensor(np.nan_to_num(values))


def _bias_of(layer: MoeLayer) -> list[tuple[Any, str]]:
    """Where the bias that ranks experts is a tensor of its own: the module that holds it, and its name there."""
    path, _, name = ((layer.rule and layer.rule.rule.bias) or "").rpartition(".")
    for place in (layer.gate, layer.moe):
        holder = getattr(place, path, None) if path else place
        if isinstance(getattr(holder, name, None) if name else None, torch.Tensor):
            return [] if name in layer.gate._parameters and not path else [(holder, name)]
    return []


def _keep(module: Any, name: str, own: torch.Tensor, *, dim: int) -> None:
    """Of a parameter or a buffer, what belongs to the experts kept."""
    store = module._parameters if name in module._parameters else module._buffers
    tensor = store[name]
    if tensor is not None:
        cut = tensor.detach().index_select(dim, own.to(tensor.device))
        store[name] = nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut


def _count_anew(model: Any, before: int, after: int) -> None:
    for module in model.modules():
        for name in _COUNTS:
            if vars(module).get(name) == before:
                setattr(module, name, after)
    config = config_of(model)
    for name in _COUNTS:
        if getattr(config, name, None) == before:
            setattr(config, name, after)


def _record(model: Any, kept: dict[int, list[int]], place: str) -> dict[str, Any]:
    """What a pruned model says of itself; experts by the numbers of the model that it was first made from."""
    earlier = getattr(model.config, RECORD, None)
    named = {str(layer): own for layer, own in kept.items()}
    if earlier is not None:
        before = earlier["kept"]
        return {**earlier, "kept": {layer: [before[layer][e] for e in own] for layer, own in named.items()}}
    name, revision = describe(model)["name"], getattr(model.config, "_commit_hash", None)
    return {"from": name, "revision": revision, "experts": n_experts(model), "in_their_place": place, "kept": named}
