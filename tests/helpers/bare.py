"""The oracle of recordings and interventions: rows run alone, without padding, cache or mixlens, through bare hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny import matrices_of

STREAM = ("resid_pre", "resid_post", "attn_out", "moe_in", "moe_out")
EXPERTS = ("expert_out", "expert_norm", "expert_neurons")
ROUTING = ("expert_id", "weight", "router_logits")


@dataclass(frozen=True)
class Change:
    """What an intervention does to a row, written out. Every function is given layer and position first.

    decide   (layer, position, logits [E]) -> (logits as they stand then, {expert: weight} strongest first)
    stream   (layer, position, site, value [H]) -> value
    neurons  (layer, position, slot, expert, value [I]) -> value, likewise output [H] of an expert, before its weight
    """

    decide: Callable | None = None
    stream: Callable | None = None
    neurons: Callable | None = None
    output: Callable | None = None


def alone(model: Any, tokens: Sequence[int], change: Change = Change()) -> dict[str, np.ndarray]:
    """Everything one row has: token_id [n], routing [n, layer, ...], every site, and logits [n, vocabulary]."""
    ids = torch.as_tensor(np.asarray(tokens, np.int64))
    seen: dict[str, dict[int, torch.Tensor]] = {}
    with torch.no_grad(), _hooks(model, change, seen):
        logits = model(ids[None], use_cache=False).logits[0].float()
    row = {name: torch.stack([by_layer[i] for i in sorted(by_layer)], 1).numpy() for name, by_layer in seen.items()}
    return {**row, "token_id": ids.numpy(), "logits": logits.numpy()}


@contextmanager
def _hooks(model: Any, change: Change, seen: dict) -> Iterator[None]:
    handles = []

    def note(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Keep [n, H] of a [1, n, H], changed where a change says so."""
        flat = value.reshape(-1, value.shape[-1])
        if change.stream is not None:
            flat = torch.stack([change.stream(layer, t, site, v) for t, v in enumerate(flat)])
        seen.setdefault(site, {})[layer] = flat
        return flat.reshape(value.shape)

    for i, layer in enumerate(model.model.layers):

        def before_layer(_m, args, kwargs, i=i):
            return (note("resid_pre", i, args[0]), *args[1:]), kwargs

        def after_attention(_m, _args, output, i=i):
            return (note("attn_out", i, output[0]), *output[1:])

        def before_moe(_m, args, i=i):
            return (note("moe_in", i, args[0]),)

        def after_gate(_m, _args, output, i=i):
            for name, value in zip(("router_logits", "weight", "expert_id"), output, strict=True):
                seen.setdefault(name, {})[i] = value

        def after_moe(moe, args, output, i=i):
            if (change.decide, change.neurons, change.output) != (None, None, None):
                output = _block(moe, args[0], i, change, seen).reshape(output.shape)
            _experts(moe, args[0], i, change, seen)
            return note("moe_out", i, output)

        def after_layer(_m, _args, output, i=i):
            return note("resid_post", i, output)

        handles += [
            layer.register_forward_pre_hook(before_layer, with_kwargs=True),
            layer.self_attn.register_forward_hook(after_attention),
            layer.mlp.register_forward_pre_hook(before_moe),
            layer.mlp.gate.register_forward_hook(after_gate),
            layer.mlp.register_forward_hook(after_moe),
            layer.register_forward_hook(after_layer),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def softmax(values: Sequence[float]) -> list[float]:
    shifted = np.exp(np.asarray(values, np.float64) - max(values))
    return (shifted / shifted.sum()).tolist()


def strongest(logits: Sequence[float], k: int, *, banned: Any = (), forced: Any = ()) -> dict[int, float]:
    """{expert: weight} of the k strongest that are allowed, those forced before all others; weights sum to 1."""
    order = sorted(range(len(logits)), key=lambda e: (e not in forced, -logits[e]))
    chosen = [e for e in order if e not in banned][:k]
    weights = dict(zip(chosen, softmax([logits[e] for e in chosen]), strict=True))
    return dict(sorted(weights.items(), key=lambda item: -item[1]))


def _block(moe: Any, hidden: torch.Tensor, layer: int, change: Change, seen: dict) -> torch.Tensor:
    """The block written out: router, top-k, renormalised softmax, and the experts one by one."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out, ids, weights, logits = torch.zeros_like(flat), [], [], []
    for t, x in enumerate(flat):
        given = (moe.gate.weight.detach() @ x).tolist()
        if change.decide is None:
            stands, chosen = given, strongest(given, seen["expert_id"][layer].shape[-1])
        else:
            stands, chosen = change.decide(layer, t, given)
        logits.append(stands)
        ids.append(list(chosen))
        weights.append(list(chosen.values()))
        for slot, (expert, weight) in enumerate(chosen.items()):
            out[t] += weight * _expert(moe, x, layer, t, slot, expert, change)[1]
    seen["expert_id"][layer] = torch.tensor(ids)
    seen["weight"][layer], seen["router_logits"][layer] = torch.tensor(weights), torch.tensor(logits)
    return out


def _expert(moe: Any, x: torch.Tensor, layer: int, t: int, slot: int, expert: int, change: Change) -> tuple:
    """(neurons [I], output [H]) of one expert at one token."""
    w1, w3, w2 = matrices_of(moe.experts, expert)
    neurons = torch.nn.functional.silu(w1 @ x) * (w3 @ x)
    if change.neurons is not None:
        neurons = change.neurons(layer, t, slot, expert, neurons)
    output = w2 @ neurons
    return neurons, output if change.output is None else change.output(layer, t, slot, expert, output)


def _experts(moe: Any, hidden: torch.Tensor, layer: int, change: Change, seen: dict) -> None:
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), seen["expert_id"][layer].tolist()
    found = [
        [_expert(moe, x, layer, t, slot, expert, change) for slot, expert in enumerate(ids[t])]
        for t, x in enumerate(flat)
    ]
    outputs = torch.stack([torch.stack([output for _, output in slots]) for slots in found])
    seen.setdefault("expert_neurons", {})[layer] = torch.stack([torch.stack([n for n, _ in slots]) for slots in found])
    seen.setdefault("expert_out", {})[layer] = outputs
    seen.setdefault("expert_norm", {})[layer] = outputs.pow(2).sum(-1).sqrt()
