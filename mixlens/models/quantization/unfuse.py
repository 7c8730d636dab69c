"""Experts with one Linear for each matrix, so that every quantizer of Linears reaches them; routers likewise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from mixlens.models.quantization.linears import dequantized
from mixlens.models.quantization.stack import Stack


class Expert(nn.Module):
    """w2(act(w1 x) * w3 x), with the names that Mixtral's checkpoints use; w2(act(w3 x)) in families without a gate.

    family  the experts that it is taken from, without their weights, where they join w1 x and w3 x in their own way
    """

    def __init__(self, hidden: int, inner: int, *, act_fn: Any, gated: bool, biased: bool, family: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=biased) if gated else None
        self.w2 = nn.Linear(inner, hidden, bias=biased)
        self.w3 = nn.Linear(hidden, inner, bias=biased)
        self.act_fn = act_fn
        self._family = [family]  # in a list, so that it is no child

    def neurons(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, I] from hidden states [n, H]."""
        return self.joined(None if self.w1 is None else self.w1(hidden), self.w3(hidden))

    def joined(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """Neurons from w1 x and w3 x."""
        family = self._family[0]
        if gate is None:
            return self.act_fn(up)
        if family is None:
            return self.act_fn(gate) * up
        both = torch.cat([gate, up], -1) if family.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return family._apply_gate(both)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.w2(self.neurons(hidden))


@use_experts_implementation
class UnfusedExperts(nn.ModuleList):
    """All experts of a layer, called as transformers calls its fused ones; the loop is that of its "eager".

    Its other implementations read fused tensors, so a model with these experts keeps to "eager".
    """

    def __init__(self, config: Any, fused: Any) -> None:
        """Linears without weights, as many and as large as the fused experts of a family have.

        config  the model's, which transformers' decorator keeps to look up the implementation in
        """
        count, *sizes = fused.down_proj.shape
        inner, hidden = sizes if fused.is_transposed else reversed(sizes)
        with torch.device("meta"):
            experts = [
                Expert(
                    hidden,
                    inner,
                    act_fn=getattr(fused, "act_fn", None),
                    gated=fused.has_gate,
                    biased=fused.has_bias,
                    family=None if _joins_as_usual(fused) else _without_weights(fused),
                ).to(fused.down_proj.dtype)
                for _ in range(count)
            ]
        super().__init__(experts)
        self.num_experts, self.hidden_dim, self.intermediate_dim = count, hidden, inner
        self.gated, self.biased = fused.has_gate, fused.has_bias
        self._stacks: dict[str, Stack] = {}

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, H] from hidden states [T, H], chosen experts [T, k] and their weights [T, k]."""
        return self.loop(hidden, ids, weights)

    @property
    def is_stacked(self) -> bool:
        return len(self._stacks) > 0

    @contextmanager
    def stacked(self) -> Iterator[None]:
        """Hold each matrix of all experts in one tensor, for `gathered`, where their scheme has such a form."""
        names = [name for name in ("w1", "w2", "w3") if name != "w1" or self.gated]
        made = {name: Stack.of([expert.get_submodule(name) for expert in self]) for name in names}
        try:
            if all(made.values()):
                self._stacks = {name: stack for name, stack in made.items() if stack is not None}
            yield
        finally:
            self._stacks = {}
            for stack in made.values():
                if stack is not None:
                    stack.take_apart()

    def gathered(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `loop`, for few tokens in compiled code, where the choice of weights is fused with their product."""
        (tokens, k), chosen, first = ids.shape, ids.reshape(-1), self[0]

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            return self._stacks[name].product(chosen, x)

        x = hidden.repeat_interleave(k, 0)
        neurons = first.joined(product("w1", x) if self.gated else None, product("w3", x))  # type: ignore[operator]
        values = product("w2", neurons) * weights.reshape(-1, 1)
        return values.view(tokens, k, -1).sum(1).to(hidden.dtype)

    def loop(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One expert after the other, each with its tokens."""
        output = torch.zeros_like(hidden)
        for number in ids.unique().tolist():
            if number == self.num_experts:  # transformers' mark of a slot that no expert takes
                continue
            slot, token = torch.where(ids.T == number)
            value = self[number](hidden[token]) * weights[token, slot, None]
            output.index_add_(0, token, value.to(output.dtype))
        return output


def is_unfused(experts: Any) -> bool:
    return isinstance(experts, UnfusedExperts)


def part_of(fused: Any, tensors: Any, expert: int, matrix: str, own: str) -> torch.Tensor:
    """The weight or bias of w1, w2 or w3 of one expert, from the tensors of fused experts by their names."""
    stacked = "down_proj" if matrix == "w2" else "gate_up_proj" if fused.has_gate else "up_proj"
    values = tensors(stacked if own == "weight" else f"{stacked}_bias")[expert]
    values = values.T if fused.is_transposed and own == "weight" else values
    if stacked != "gate_up_proj":
        return values
    half = values.chunk(2) if fused.is_concatenated else (values[::2], values[1::2])
    return half[0 if matrix == "w1" else 1]


def _joins_as_usual(fused: Any) -> bool:
    return fused.has_gate is False or type(fused)._apply_gate.__module__ == "transformers.integrations.moe"


def _without_weights(fused: Any) -> Any:
    shell = copy.copy(fused)
    shell._parameters = {}
    return shell


class QuantizedRouter(nn.Module):
    """Mixtral's router over a quantized Linear."""

    def __init__(self, linear: nn.Module, top_k: int) -> None:
        super().__init__()
        self.linear, self.top_k = linear, top_k

    @property
    def weight(self) -> torch.Tensor:
        """[E, H], as it computes."""
        return dequantized(self.linear)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits [T, E], weights [T, k] float32, chosen experts [T, k])."""
        logits = self.linear(hidden.flatten(0, -2))
        weights, ids = torch.topk(logits.float().softmax(-1), self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), ids


def unfuse(model: Any) -> Any:
    """Turn the experts of a loaded, unquantized Mixtral into Linears, layer by layer and in place; gives the model.

    Logits stay as they were within rounding. `save_pretrained` writes the same checkpoint as before.
    """
    for layer in model.model.layers:
        fused = layer.mlp.experts
        if is_unfused(fused):
            continue
        experts: Any = UnfusedExperts(fused.config, fused)
        for number, expert in enumerate(experts):
            for name in ("w1", "w2", "w3"):
                weight = part_of(fused, lambda own, of=fused: getattr(of, own).detach(), number, name, "weight")
                linear = expert.get_submodule(name)
                linear.weight = nn.Parameter(weight.clone(), requires_grad=fused.down_proj.requires_grad)
        layer.mlp.experts = experts.train(model.training)
    model.set_experts_implementation("eager")
    return model
