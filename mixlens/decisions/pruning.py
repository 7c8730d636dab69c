"""prune: remove some experts of a model, or replace them by their mean output."""

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
from mixlens.models.layout import MoeLayer, config_of, moe_layers, n_experts, unwrapped
from mixlens.models.provenance import describe
from mixlens.models.surgery import count_anew, keep_experts, keep_rows, refuse_whole

RECORD = "mixlens_pruned"


def prune(model: nn.Module, keep: Mapping[int, Iterable[int]] | xr.DataArray, *, means: Any = None) -> Any:
    """Create a model with only some of the experts.

    Other experts are removed with their router rows, so that tokens choose the next best. Unchanged weights are shared
    with `model`, which is not modified. With `means`, the router stays complete and removed experts return their mean
    output; such a model runs in mixlens, but no checkpoint of its family supports it.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model without quantization, whose routing rule mixlens knows.
    keep : Mapping[int, Iterable[int]] or xarray.DataArray
        Experts by layer, or booleans [layer, expert], as from `strongest`. Without `means`, every layer must keep the
        same number, since the config has one number for all layers.
    means : xarray.DataArray, optional
        Mean outputs [layer, expert, hidden], such as ``expert_outputs(...)["mean"]``; layers missing in `keep` stay
        complete.

    Returns
    -------
    Any
        A model of the same class. ``config.mixlens_pruned`` records the original model and the numbers of the kept
        experts in it.

    Raises
    ------
    BadInput
        If layers or experts are unknown, layers keep different numbers of experts or fewer than a token chooses, or
        means are missing.
    ModelError
        If the model is sharded, offloaded, quantized, under edits or adapters, or its routers are limited to groups or
        follow an unknown rule.

    Examples
    --------
    >>> smaller = ml.decisions.prune(model, {layer: range(6) for layer in range(8)})
    >>> smaller.config.num_local_experts, model.config.num_local_experts
    (6, 8)
    """
    inner: Any = unwrapped(model)
    refuse_edited(inner, "prune")
    refuse_whole(inner, "prune experts", routers=means is None)
    count = n_experts(inner)
    kept = _kept(moe_layers(inner), keep, count, whole=means is not None)
    smaller = copy.deepcopy(inner, {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())})
    for layer in moe_layers(smaller):
        experts: Any = layer.experts
        own = torch.tensor(kept[layer.index], device=experts.down_proj.device)
        if len(own) == count:
            continue
        keep_experts(layer, own)
        if means is None:
            keep_rows(layer, own)
        else:
            stand_ins = _means_of(means, layer.index, kept[layer.index], inner)
            layer.moe.experts = WithMeans(experts, own, stand_ins.to(experts.down_proj))
    if means is None:
        count_anew(smaller, count, len(next(iter(kept.values()))))
    setattr(smaller.config, RECORD, _record(inner, kept, "removed" if means is None else "mean output"))
    return smaller


class WithMeans(nn.Module):
    """Experts of which some are replaced by their mean output; called with the router's expert numbers."""

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
        """Return [T, H] from hidden states [T, H], chosen experts [T, k] and their weights [T, k]."""
        place = self.place[ids]
        gone = place < 0
        output = self.kept(hidden, place.clamp(min=0), weights.masked_fill(gone, 0))
        stand_in = weights.masked_fill(~gone, 0)[..., None] * self.means[ids]
        return output + stand_in.sum(1).to(output.dtype)


def refuse_edited(model: nn.Module, what: str) -> None:
    """Raise ModelError for a model under edits, which are not part of its weights."""
    if active := edits_of(model):
        raise ModelError(
            f"Cannot {what} a model under edits ({', '.join(active)}): they are not part of its weights. Do it outside "
            "the edit.",
            argument="model",
            value=active,
        )


def _kept(layers: list[MoeLayer], keep: Any, count: int, *, whole: bool) -> dict[int, list[int]]:
    """Return {layer: kept experts, ascending} of every layer; with `whole`, omitted layers stay complete."""

    def refused(why: str, value: Any) -> BadInput:
        return BadInput(f"Cannot prune: {why}.", argument="keep", value=value)

    if isinstance(keep, xr.DataArray) and set(keep.dims) == {"layer", "expert"} and keep.dtype == bool:
        keep = {int(layer): keep.expert.values[keep.sel(layer=layer).values] for layer in keep.layer.values}
    if not isinstance(keep, Mapping):
        shown = "{0: [0, 1, 4, 5, 6, 7], ...}, or booleans [layer, expert] as ml.decisions.strongest gives them"
        raise refused(
            f"a {type(keep).__name__} is not a mapping from layers to experts. Pass {shown}", type(keep).__name__
        )
    known = {layer.index: layer.top_k for layer in layers}
    asked = {layer: sorted(set(whole_numbers(experts))) for layer, experts in keep.items()}
    if unknown := sorted(set(asked) - set(known)):
        raise refused(f"layers {unknown} have no experts; {numbered(list(known))} do. Pass those", unknown)
    kept = {layer: asked.get(layer, list(range(count))) for layer in known}
    for layer, own in kept.items():
        if own and not 0 <= own[0] <= own[-1] < count:
            raise refused(f"layer {layer} has experts 0 to {count - 1}, and not all of {own}. Pass numbers of it", own)
        if len(own) < (least := 1 if whole else known[layer]):
            raise refused(f"layer {layer} keeps {len(own)} experts, and every token needs {least}. Keep more", len(own))
    numbers = sorted({len(own) for own in kept.values()})
    if len(numbers) > 1 and not whole:
        raise refused(
            f"one layer keeps {numbers[0]} experts and another {numbers[-1]}, and a config has one number for all. "
            "Keep as many of each, or pass means=, which leaves the routers whole",
            numbers,
        )
    if numbers == [count]:
        raise refused(f"every layer keeps all its {count} experts. Keep fewer", count)
    return kept


def _means_of(means: Any, layer: int, kept: list[int], model: Any) -> torch.Tensor:
    """Return the means [expert, hidden] of one layer. Raises BadInput if a removed expert has none."""
    shape = n_experts(model), int(config_of(model).hidden_size)
    gone = sorted(set(range(shape[0])) - set(kept))
    known = isinstance(means, xr.DataArray) and set(means.dims) == {"layer", "expert", "hidden"}
    if known and layer in means.layer.values:
        own = means.sel(layer=layer).transpose("expert", "hidden").values
        if own.shape == shape and np.isfinite(own[gone]).all():
            return torch.as_tensor(np.nan_to_num(own))
    raise BadInput(
        f"Cannot put means in the place of experts {gone} of layer {layer}: one of them has none in what was given, of "
        f'{shape[1]} numbers. Pass ml.experiments.expert_outputs(model, documents)["mean"] of this model over more '
        "text, or keep these experts.",
        argument="means",
        value=(layer, gone),
    )


def _record(model: Any, kept: dict[int, list[int]], place: str) -> dict[str, Any]:
    """Return the pruning record of a model, with experts numbered as in the model first pruned."""
    earlier = getattr(model.config, RECORD, None)
    named = {str(layer): own for layer, own in kept.items()}
    if earlier is not None:
        before = earlier["kept"]
        return {**earlier, "kept": {layer: [before[layer][e] for e in own] for layer, own in named.items()}}
    name, revision = describe(model)["name"], getattr(model.config, "_commit_hash", None)
    return {"from": name, "revision": revision, "experts": n_experts(model), "in_their_place": place, "kept": named}
