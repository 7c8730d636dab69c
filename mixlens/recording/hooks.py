"""Tap: the hooks that see what gates, sites and experts put out, and leave the forward as it was."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from mixlens.errors import BadInput, ModelError, RecordingError, visible
from mixlens.interventions.activations import Replaced, replaced_in, see_site
from mixlens.interventions.hooks import weights_are_given
from mixlens.interventions.transforms import recomputing
from mixlens.models.layout import (
    MoeLayer,
    config_of,
    expert_down,
    expert_neurons,
    moe_layers,
    n_experts,
    refuse_sharded,
    refuse_without_experts,
)
from mixlens.trace import shards
from mixlens.trace.signals import EXPERT_SITES, Signals

BAD_LAYER = "bad_layer"

Raw = dict[str, dict[int, torch.Tensor]]
LeftOut = tuple[str, int, int]  # whose token, its position, the layer


class _State:
    """What a Tap knows of the forward that runs."""

    def __init__(self) -> None:
        self.listening = False
        self.decoding = False
        self.compiled = False
        self.raw: Raw = {}


class _ThreadState(threading.local, _State):
    """The same, of each thread's own forward."""


class Tap:
    """Keeps references to what one forward puts out, while `listening`; `take` gives them and forgets.

    The hooks copy nothing and wait for nothing, so the forward is bit for bit the one without them. A recomputation
    during backward finds the tap not listening. Hooks are gone after `close`, whatever happened.

    threads  whether each thread has a forward of its own; compiled code cannot tell threads apart
    into     {name: {layer: tensor [n, ...]}}, into whose first rows a compiled forward copies, for `taken_into`: a
             region that is compiled once for all layers may write to what it was given, and can keep no reference
    """

    def __init__(self, model: nn.Module, signals: Signals, *, threads: bool = True, into: Raw | None = None) -> None:
        self.signals, self._into = signals, into
        self.now: _State = _ThreadState() if threads else _State()
        self._stack = ExitStack()
        self._model = model
        self._layers = layers = moe_layers(model)
        self.n_experts = n_experts(model)
        self._normed = all(isinstance(layer.gate, MixtralTopKRouter) for layer in layers)
        self._unordered = {layer.index for layer in layers if not layer.family.ordered}
        self._wanted = {"expert_id": [layer.index for layer in layers]}
        self._wanted |= {site.name: list(site.layers or ()) for site in signals.sites}
        self._watching = threads
        self._handles: list[Any] = []
        self._strays: dict[int, set[int]] = {}  # layers that ran outside a forward, by thread
        self._seen: dict[int, tuple[torch.Tensor, ...]] = {}
        if expert_sites := [site.name for site in signals.sites if site.name in EXPERT_SITES]:
            refuse_sharded(model, f"record {', '.join(expert_sites)}")
        if self.n_experts > shards.MOST_EXPERTS:
            raise ModelError(
                f"Cannot record this model: it has {self.n_experts} experts a layer, and a trace holds ids of up to "
                f"{shards.MOST_EXPERTS}. Record a model of at most {shards.MOST_EXPERTS}.",
                argument="model",
                value=self.n_experts,
            )
        try:
            for layer in layers:
                self._hook(layer.gate.register_forward_hook(self._on_gate(layer)))
            for site in signals.sites:
                for layer in layers:
                    if layer.index not in (site.layers or ()):
                        continue
                    if site.name in EXPERT_SITES:
                        refuse_without_experts(layer, f"record {site.name}", inside=True)
                    else:
                        self._hook(see_site(layer, site.name, partial(self._keep, site.name, layer.index)))
            wanted = {site.name: set(site.layers or ()) for site in signals.sites if site.name in EXPERT_SITES}
            if wanted:
                self._stack.callback(_capture_experts(model, layers, wanted, self))
        except BaseException:
            self.close()
            raise

    def take(self) -> Raw:
        """{name: {layer: tensor [T, ...]}} of the forward since the last call; T counts the whole padded batch."""
        raw, self.now.raw = self.now.raw, {}
        return self._ordered(raw)

    def taken_into(self, places: int) -> Raw:
        """The same of a compiled forward of so many places."""
        into = self._into or {}
        return self._ordered({name: {at: rows[:places] for at, rows in own.items()} for name, own in into.items()})

    def _ordered(self, raw: Raw) -> Raw:
        for index in [index for index in self._unordered if index in raw.get("weight", {})]:
            order = raw["weight"][index].argsort(dim=-1, descending=True, stable=True)
            for name in ("weight", "expert_id", *EXPERT_SITES):
                if index in raw.get(name, {}):
                    values = raw[name][index]
                    at = order.reshape(*order.shape, *[1] * (values.ndim - 2)).expand_as(values)
                    raw[name][index] = values.gather(1, at)
        return raw

    def check(self, raw: Raw, tokens: int) -> None:
        """Raises RecordingError unless every hook that `raw` is of has seen so many tokens, once."""
        for name, layers in self._wanted.items():
            found = raw.get(name, {})
            if missing := sorted(set(layers) - set(found)):
                raise RecordingError(
                    f"Cannot record {name} in layers {missing}: their modules ran without their hooks, or not at all. "
                    "They were replaced, or run by code that was compiled before; enter the Recorder after that.",
                    argument=name,
                    value=missing,
                )
            partly = {layer for layer in layers if not found[layer].numel()}
            if name == "expert_id":
                partly |= {layer for layer in layers if len(found[layer]) != tokens}
            if partly:
                raise RecordingError(
                    f"Cannot record {name} in layers {sorted(partly)}: their modules ran on a part of the tokens, or "
                    "several times in one forward. Let every layer read all tokens at once.",
                    argument=name,
                    value=sorted(partly),
                )

    def check_strays(self) -> None:
        """Raises RecordingError where layers ran, and no forward of the decoder called them."""
        strays = {layer for thread in list(self._strays) for layer in self._strays.pop(thread, ())}
        if strays:
            raise RecordingError(
                f"Cannot record what layers {sorted(strays)} read outside a forward: their own forward was called, or "
                "that of the decoder as decoder.forward(). Call the model or its decoder itself inside the block.",
                argument="layers",
                value=sorted(strays),
            )

    def begin(self, *, decoding: bool) -> None:
        """Listen to a forward, after all hooks that may change what the modules put out."""
        self.now.raw = {}  # of a forward that failed half-way
        for handle in self._handles:
            handle.hooks_dict_ref().move_to_end(handle.id)
        self.now.listening, self.now.decoding = True, decoding

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token's experts do, with the edits now in force: then the last need not be kept."""
        return self._normed and not weights_are_given(self._model)

    def rule(self, *, edited: bool) -> str:
        """Whether the rule of the routers is "known": the family has one, and it explains what the first forward did.

        edited  whether edits were in force, which refuse routers that decide otherwise themselves
        """
        rules = {layer.index: rule for layer in self._layers if (rule := layer.rule) is not None}
        if len(rules) < len(self._layers):
            return "unknown"
        if not edited and not self._seen:
            return "unchecked"
        explained = (edited or rules[index].agrees(*seen) for index, seen in self._seen.items())
        return "known" if all(explained) else "unknown"

    def look(self, raw: Raw) -> None:
        """Keep a first forward whose hooks were compiled."""
        names = ("router_logits", "weight", "expert_id")
        if not self._seen and all(name in raw for name in names):
            self._seen = {index: tuple(raw[name][index] for name in names) for index in raw["expert_id"]}

    def close(self) -> None:
        self._stack.close()
        self.now.raw = {}

    def _hook(self, handle: Any) -> None:
        self._handles.append(handle)
        self._stack.callback(handle.remove)

    def _keep(self, name: str, index: int, value: torch.Tensor) -> None:
        if self._into is not None and self.now.compiled:
            self._into[name][index][: len(value)].copy_(value.detach())
        elif self.now.listening:
            layers = self.now.raw.setdefault(name, {})
            layers[index] = value[:0] if index in layers else value.detach()  # `check` refuses the former

    def _on_gate(self, layer: MoeLayer) -> Callable[..., None]:
        index = layer.index

        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if module is not layer.gate:  # of a copy of the model
                return
            if not self.now.listening:
                if not recomputing():
                    self._strays.setdefault(threading.get_ident(), set()).add(index)
                return
            logits, weights, ids = layer.read(output)
            if self._watching and index not in self._seen:
                self._seen[index] = (logits.detach(), weights.detach(), ids)
            self._keep("expert_id", index, ids)
            self._keep("weight", index, weights)
            if self.signals.router_logits:
                self._keep("router_logits", index, logits)

        return hook


def gather(values: dict[int, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """[n, layer, ...] on the CPU: the rows of every layer's tensor, layers in order, wherever each one lives."""
    ordered = [values[index] for index in sorted(values)]
    if len({value.device for value in ordered}) == 1:
        # Selecting before stacking would cost one kernel a layer; one copy then leaves the device.
        return torch.stack(ordered, 1)[rows.to(ordered[0].device)].cpu()
    return torch.stack([value[rows.to(value.device)].cpu() for value in ordered], 1)


def routing_arrays(raw: Raw, rows: torch.Tensor, n_experts: int, *, packed: bool) -> dict[str, np.ndarray]:
    """expert_id [n, L, k], weight float16 [n, L, k] and router_logits [n, L, E] of the rows, and BAD_LAYER [n].

    router_logits are float16, or float32 where one of them is beyond the range of float16.

    packed  leaves out the last slot's weight, which is one minus the rest

    Layers that choose fewer experts than others have `shards.no_expert` in the slots left, with weight 0. BAD_LAYER is
    the first layer whose weights are not finite, and -1 where all are: then ids mean nothing.
    """
    choices = {value.shape[-1] for value in raw["expert_id"].values()}
    dtype, slots = shards.id_dtype(n_experts, ragged=len(choices) > 1), max(choices)
    ids = gather(widened(raw["expert_id"], slots, shards.no_expert(dtype)), rows)
    weight = gather(widened(raw["weight"], slots, 0), rows)
    bad = ~weight.isfinite().all(-1)
    arrays = {
        "expert_id": ids.numpy().astype(dtype),
        "weight": (weight[..., :-1] if packed else weight).to(torch.float16).contiguous().numpy(),
        BAD_LAYER: torch.where(bad.any(-1), bad.int().argmax(-1), -1).numpy(),
    }
    if "router_logits" in raw:
        logits = gather(raw["router_logits"], rows).float().numpy()
        arrays["router_logits"] = shards.narrowed(logits, np.float16)
    return arrays


def widened(values: dict[int, torch.Tensor], slots: int, missing: int) -> dict[int, torch.Tensor]:
    return {
        index: value if value.shape[-1] == slots else F.pad(value, (0, slots - value.shape[-1]), value=missing)
        for index, value in values.items()
    }


def warn_of_left_out(left_out: list[LeftOut]) -> None:
    """Say which tokens have no routing, and why there is nothing of them in the trace."""
    if not left_out:
        return
    places = "; ".join(
        f"{visible(where)}, position {position}, layer {layer}" for where, position, layer in left_out[:3]
    )
    warnings.warn(
        f"{len(left_out):,} tokens are left out of the trace: their routing weights are not finite, so that their "
        f"experts mean nothing ({places}{' ...' if len(left_out) > 3 else ''}). Check the weights and the dtype of the "
        "model.",
        stacklevel=3,
    )


def refuse_left_out(doing: str, left_out: list[tuple[int, int, int]]) -> None:
    """Raises ModelError where tokens, each (sequence, position, layer), have no routing and all of them are needed."""
    if left_out:
        sequence, position, layer = left_out[0]
        raise ModelError(
            f"Cannot {doing}: {len(left_out):,} tokens have routing weights that are not finite, the first of them in "
            f"sequence {sequence}, position {position}, layer {layer}. Check the weights and the dtype of the model.",
            argument="model",
            value=left_out[0],
        )


def warn_of_unscored(tokens: int) -> None:
    """Say how many tokens have no log-probability because the model's logits hold NaN."""
    if tokens:
        warnings.warn(
            f"{tokens:,} tokens have NaN as log-probability: the logits before them are not finite. Their routing is "
            "what the routers decided, but the model's answers mean nothing. Check its weights and dtype.",
            stacklevel=3,
        )


def site_array(raw: Raw, site: str, dtype: str, rows: torch.Tensor) -> np.ndarray:
    """[n, layer, ...] of one site in the asked dtype.

    Raises BadInput when float16 cannot hold a value.
    """
    per_layer = raw[site]
    if site not in EXPERT_SITES:
        per_layer = {index: value.reshape(-1, value.shape[-1]) for index, value in per_layer.items()}
    values = gather(per_layer, rows)
    stored = values.to(getattr(torch, dtype))
    if dtype == "float16" and bool((stored.isinf() & values.isfinite()).any()):
        raise BadInput(
            f"Cannot store activations of {site} in float16: a value of {values.float().abs().max():.3g} is too "
            f'large. Record with Site("{site}", dtype="float32").',
            argument="dtype",
            value=site,
        )
    return stored.numpy()


def _capture_experts(model: Any, layers: list[MoeLayer], wanted: dict[str, set[int]], tap: Tap) -> Callable[[], None]:
    """Run a function of ours in place of the experts' own, which it delegates to; gives the way back.

    An experts function, unlike a forward hook, still has the weights at hand when accelerate offloads them.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before: str = config_of(model)._experts_implementation or "eager"
    name = f"mixlens_{before}_{id(tap):x}"
    number = {id(layer.experts): layer.index for layer in layers}

    def experts_forward(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # generate decodes with batched_mm on an accelerator when it finds grouped_mm; it finds our name instead.
        swap = before == "grouped_mm" and tap.now.decoding and hidden.device.type != "cpu"
        chosen = "batched_mm" if swap else before
        own = ALL_EXPERTS_FUNCTIONS.get_interface(chosen, type(module).forward.__wrapped__)
        output = own(module, hidden, ids, weights)
        index = number[id(module)]
        sites = [site for site, indices in wanted.items() if index in indices]
        if tap.now.listening and sites:
            for site, value in _chosen_experts(module, hidden.detach(), ids, sites).items():
                tap._keep(site, index, _with_edits(site, value, replaced_in(module)))
        return output

    ALL_EXPERTS_FUNCTIONS[name] = experts_forward
    model.set_experts_implementation(name)

    def restore() -> None:
        model.set_experts_implementation(before)
        del ALL_EXPERTS_FUNCTIONS[name]

    return restore


@torch.no_grad()
def _chosen_experts(module: Any, hidden: torch.Tensor, ids: torch.Tensor, sites: list[str]) -> dict[str, torch.Tensor]:
    """Output [T, k, H], its norm [T, k] and neurons [T, k, I] of every chosen expert, computed expert by expert."""
    found: dict[str, torch.Tensor] = {}

    def put(site: str, values: torch.Tensor) -> None:
        if site in sites:
            like = found.setdefault(site, values.new_zeros((*ids.shape, *values.shape[1:])))
            like[token, slot] = values

    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        neurons = expert_neurons(module, expert, hidden[token])
        put("expert_neurons", neurons)
        if "expert_out" in sites or "expert_norm" in sites:
            output = expert_down(module, expert, neurons)
            put("expert_out", output)
            put("expert_norm", output.float().norm(dim=-1).to(output.dtype))
    return found


def _with_edits(site: str, value: torch.Tensor, replaced: Replaced | None) -> torch.Tensor:
    """What the model goes on with where an edit replaces outputs; their neurons are those computed, or patched."""
    if replaced is None:
        return value
    if site == "expert_neurons":
        for hit, neurons in replaced.neurons:
            value = torch.where(hit[..., None], neurons.to(value), value)
        return value
    stand_in = torch.zeros(()) if replaced.value is None else replaced.value
    if site == "expert_norm":
        stand_in = stand_in.float().norm(dim=-1) if stand_in.ndim else stand_in
        return torch.where(replaced.hit, stand_in.to(value), value)
    return torch.where(replaced.hit[..., None], stand_in.to(value), value)
