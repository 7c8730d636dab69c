"""Edits of activations: values put at a site, and in place of what a chosen expert put out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from accelerate.utils import align_module_device
from torch import nn

from mixlens.errors import BadInput
from mixlens.interventions.places import Placed
from mixlens.interventions.routing import Layers, Rows
from mixlens.interventions.where import EVERYWHERE, Where
from mixlens.models.layout import MoeLayer, expert_down, is_part

PATCHED_EXPERTS = ("expert_out", "expert_neurons")
_REPLACED = "_mixlens_replaced"


@dataclass
class Replaced:
    """What edits put in place of expert outputs, while one experts module runs.

    hit      bool [T, k], the slots that are replaced
    value    [T, k, H]; None where all of them are zero
    weights  [T, k], the weights before those of replaced slots were taken out
    neurons  pairs of bool [T, k] and [T, k, I], what patches put in place of neurons, the later on top
    """

    hit: torch.Tensor
    weights: torch.Tensor
    value: torch.Tensor | None = None
    neurons: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def put(self, hit: torch.Tensor, value: torch.Tensor | None, like: torch.Tensor) -> None:
        """value [T, k, H] or what broadcasts to it; None is zero."""
        if value is not None and self.value is None:
            self.value = like.new_zeros((*hit.shape, like.shape[-1]))
        if self.value is not None:
            self.value = torch.where(hit[..., None], 0 if value is None else value.to(self.value), self.value)
        self.hit = self.hit | hit

    def added(self, output: torch.Tensor) -> torch.Tensor:
        """`output` of the experts [T, H] with the replaced slots' weighted values."""
        if self.value is None:
            return output
        weights = self.weights.masked_fill(~self.hit, 0)[..., None]
        return output + (weights * self.value).sum(1).to(output.dtype)


def replaced_in(experts: nn.Module) -> Replaced | None:
    """What is being put in place of the outputs of this experts module, which is running."""
    return vars(experts).get(_REPLACED)


def forget_replaced(experts: nn.Module) -> None:
    """Leave nothing behind of a forward that failed half-way."""
    vars(experts).pop(_REPLACED, None)


def hook_experts(layer: MoeLayer, edits: list[Any]) -> list[Any]:
    """Hooks that take replaced slots out of the experts' sum and add what stands for them; gives their handles.

    Works whatever the layout of experts, quantized or offloaded; patches of neurons alone need the weights.
    """

    def before(module: nn.Module, args: tuple) -> tuple:
        if not is_part(module, layer.experts):
            return args
        hidden, ids, weights, *rest = args
        replaced = Replaced(torch.zeros_like(ids, dtype=torch.bool), weights)
        for active in edits:
            hit, value = active.edit.replace(layer, ids, active.rows_on(ids.device), active.index)
            if isinstance(active.edit, Patch) and active.edit.site == "expert_neurons":
                replaced.neurons.append((hit, value))
                value = _down(layer, ids, hit, value.to(hidden.dtype), hidden.shape[-1])
            replaced.put(hit, value, hidden)
        setattr(module, _REPLACED, replaced)
        return hidden, ids, weights.masked_fill(replaced.hit, 0), *rest

    def after(module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        replaced = vars(module).pop(_REPLACED, None)
        return output if replaced is None else replaced.added(output)

    return [
        layer.experts.register_forward_pre_hook(before, prepend=True),
        layer.experts.register_forward_hook(after, prepend=True),
    ]


def hook_site(layer: MoeLayer, site: str, edits: list[Any]) -> Any:
    """A hook that puts the patches' values at a site of a layer; gives its handle."""

    def patched(value: torch.Tensor) -> torch.Tensor:
        flat = value.reshape(-1, value.shape[-1])
        for active in edits:
            flat = active.edit.put(flat, active.rows_on(flat.device), active.index)
        return flat.reshape(value.shape)

    def of_output(module: nn.Module, _args: Any, output: Any) -> Any:
        if not is_part(module, place):
            return output
        return (patched(output[0]), *output[1:]) if isinstance(output, tuple) else patched(output)

    def of_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if not is_part(module, place):
            return args, kwargs
        if args:
            return (patched(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": patched(kwargs["hidden_states"])}

    place, is_input = _place(layer, site)
    if is_input:
        return place.register_forward_pre_hook(of_input, with_kwargs=True, prepend=True)
    return place.register_forward_hook(of_output, prepend=True)


def see_site(layer: MoeLayer, site: str, keep: Callable[[torch.Tensor], None]) -> Any:
    """A hook that shows what is at a site of a layer; gives its handle."""

    def of_input(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def of_output(_module: nn.Module, _args: Any, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    module, is_input = _place(layer, site)
    if is_input:
        return module.register_forward_pre_hook(of_input, with_kwargs=True)
    return module.register_forward_hook(of_output)


def _place(layer: MoeLayer, site: str) -> tuple[nn.Module, bool]:
    """The module of a site, and whether the site is its input. Raises BadInput where the layer has no such module."""
    inputs = {"resid_pre": layer.decoder, "moe_in": layer.moe}
    outputs = {
        "resid_post": layer.decoder,
        "attn_out": layer.attention,
        "moe_out": layer.moe,
        "shared_out": layer.shared,
        "shared_gate": layer.shared_gate,
    }
    module = (inputs | outputs)[site]
    if module is None:
        raise BadInput(
            f"Cannot use the site {site} in layer {layer.index}: this layer has none, or several. Pass "
            "layers= that have it, or another site.",
            argument="site",
            value=(site, layer.index),
        )
    return module, site in inputs


@dataclass(frozen=True, eq=False)
class Output:
    """Chosen experts put out zero, or their mean; weights stay.

    means  {layer: [expert, hidden]}; None is zero
    """

    layers: Layers
    experts: tuple[int, ...]
    means: dict[int, torch.Tensor] | None = field(repr=False)
    where: Where = EVERYWHERE
    how: str = field(init=False)

    def __post_init__(self) -> None:
        digest = None if self.means is None else digest_of(*self.means.values())
        object.__setattr__(self, "how", "zero" if digest is None else f"mean {digest}")

    def replace(self, layer: MoeLayer, ids: torch.Tensor, rows: Rows, index: Any) -> tuple[torch.Tensor, Any]:
        hit = torch.isin(ids, torch.tensor(self.experts, device=ids.device))
        hit = hit if rows is None else hit & rows[:, None]
        if self.means is None:
            return hit, None
        means = self.means[layer.index].to(ids.device)
        return hit, means[ids.clamp(max=len(means) - 1)]

    def check(self, hidden: int, neurons: int, top_k: int) -> None:
        """Raises BadInput unless means have the model's width."""
        for layer, mean in (self.means or {}).items():
            if mean.shape[-1] != hidden:
                raise BadInput(
                    f"Cannot set experts to their mean in layer {layer}: it has {mean.shape[-1]} numbers, and the "
                    f"hidden states of the model have {hidden}. Pass means of this model's experts.",
                    argument="mean",
                    value=mean.shape[-1],
                )


@dataclass(frozen=True, eq=False)
class Patch:
    """Values at a site of one layer.

    values     [hidden] for every token meant, or [n, hidden]; [slot, hidden] or [n, slot, hidden] for all slots of
               expert_out; likewise with neurons for expert_neurons
    expert     for sites of experts: the slots that chose this expert; None for all slots
    sequences  int64 [n] and
    positions  int64 [n]: the row, as a Recorder would number it, or -1 for any, and the position of each value
    """

    site: str
    values: torch.Tensor = field(repr=False)
    layers: Layers
    expert: int | None = None
    sequences: np.ndarray | None = field(default=None, repr=False)
    positions: np.ndarray | None = field(default=None, repr=False)
    where: Where = EVERYWHERE
    content: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", f"{tuple(self.values.shape)} {digest_of(self.values)}")

    @property
    def experts(self) -> tuple[int, ...]:
        return () if self.expert is None else (self.expert,)

    def locator(self) -> Patch | Where:
        return self.where if self.positions is None else self

    def locate(self, placed: Placed) -> tuple[np.ndarray, np.ndarray]:
        """(bool, index into values or -1), both [rows, columns]."""
        assert self.positions is not None
        assert self.sequences is not None
        width = int(max(self.positions.max(), placed.position.max())) + 1
        index = np.full(placed.ids.shape, -1)
        for sequence in np.unique(placed.sequence):
            meant = np.isin(self.sequences, (-1, sequence))
            table = np.full(width, -1)
            table[self.positions[meant]] = np.flatnonzero(meant)
            here = placed.sequence == sequence
            index[here] = table[placed.position[here]]
        mask, _ = self.where.locate(placed)
        return mask & (index >= 0), index

    def _at_tokens(self, index: Any, like: torch.Tensor) -> torch.Tensor:
        """[T, ...] or, where every token has the same, [...]."""
        values = self.values.to(like)
        return values if self.positions is None else values[torch.from_numpy(np.maximum(index, 0)).to(like.device)]

    def put(self, flat: torch.Tensor, rows: Rows, index: Any) -> torch.Tensor:
        values = self._at_tokens(index, flat)
        return values.expand_as(flat).clone() if rows is None else torch.where(rows[:, None], values, flat)

    def slots(self, ids: torch.Tensor, index: Any) -> torch.Tensor:
        """The values for every slot [T, k, ...], or what broadcasts to it."""
        values = self._at_tokens(index, self.values.to(ids.device))
        return values if self.expert is None else values[..., None, :]

    def replace(self, layer: MoeLayer, ids: torch.Tensor, rows: Rows, index: Any) -> tuple[torch.Tensor, Any]:
        hit = torch.ones_like(ids, dtype=torch.bool) if self.expert is None else ids == self.expert
        hit = hit if rows is None else hit & rows[:, None]
        return hit, self.slots(ids, index)

    def check(self, hidden: int, neurons: int, top_k: int) -> None:
        """Raises BadInput unless the values have the shape of the site."""
        width = neurons if self.site == "expert_neurons" else hidden
        own = (top_k, width) if self.site in PATCHED_EXPERTS and self.expert is None else (width,)
        given = tuple(self.values.shape[0 if self.positions is None else 1 :])
        if given != own:
            raise BadInput(
                f"Cannot patch {self.site} with values of shape {list(self.values.shape)}: the site has {list(own)} "
                f"per token. Pass {list(own)}, or [n, {', '.join(map(str, own))}] with n positions.",
                argument="values",
                value=tuple(self.values.shape),
            )


def _down(layer: MoeLayer, ids: torch.Tensor, hit: torch.Tensor, neurons: torch.Tensor, width: int) -> torch.Tensor:
    """[T, k, H], what the chosen experts' w2 makes of these neurons, where they are hit."""
    neurons = neurons.expand(*ids.shape, -1)
    value = neurons.new_zeros((*ids.shape, width))
    with align_module_device(layer.experts):  # fused weights that accelerate offloads are here in their forward only
        for expert in ids[hit].unique().tolist():
            token, slot = torch.where(hit & (ids == expert))
            value[token, slot] = expert_down(layer.experts, expert, neurons[token, slot])
    return value


def values_of(
    site: str, values: Any, layer: int, expert: int | None, where: Where
) -> tuple[torch.Tensor, np.ndarray | None, np.ndarray | None]:
    """(values, sequence of each or -1 for any row, position of each) of what was given to `patch`.

    Raises BadInput when values for single tokens come without positions, or without this layer.
    """
    if isinstance(values, xr.DataArray):
        if layer not in values.layer.values:
            raise BadInput(
                f"Cannot patch {site} of layer {layer}: the recording has layers "
                f"{np.atleast_1d(values.layer.values).tolist()}. Record the site in this layer.",
                argument="layer",
                value=layer,
            )
        own = values.sel(layer=layer) if "layer" in values.dims else values
        found = torch.as_tensor(np.ascontiguousarray(own.values))
        return found, own.sequence.values.astype(np.int64), own.position.values.astype(np.int64)
    try:
        found = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"Cannot patch {site} with a {type(values).__name__}: expected an array of numbers. Pass a tensor, an "
            "array or a recorded activation.",
            argument="values",
            value=values,
        ) from error
    if found.ndim == (2 if site in PATCHED_EXPERTS and expert is None else 1):
        return found, None, None
    positions = np.asarray(() if where.positions is None else where.positions, np.int64)
    if len(positions) != len(found):
        raise BadInput(
            f"Cannot patch {site} with values of shape {list(found.shape)}: where= selects {len(positions)} "
            "positions. Pass one value for every selected token, or as many positions as values.",
            argument="positions",
            value=len(positions),
        )
    return found, np.full(len(positions), -1), positions


def digest_of(*tensors: torch.Tensor) -> str:
    """A short fingerprint of values, for plans and for telling edits apart."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
