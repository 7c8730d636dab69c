"""Experts with one Linear for each matrix, so that every quantizer of Linears reaches them; routers likewise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from mixlens.models.quantization.linears import dequantized


class Expert(nn.Module):
    """w2(act(w1 x) * w3 x), with the names that checkpoints use."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def neurons(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, I] from hidden states [n, H]."""
        return self.act_fn(self.w1(hidden)) * self.w3(hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.w2(self.neurons(hidden))


@use_experts_implementation
class UnfusedExperts(nn.ModuleList):
    """All experts of a layer, called as transformers calls its fused ones; the loop is that of its "eager".

    Its other implementations read fused tensors, so a model with these experts keeps to "eager".
    """

    def __init__(self, config: Any) -> None:
        super().__init__(Expert(config) for _ in range(config.num_local_experts))
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, H] from hidden states [T, H], chosen experts [T, k] and their weights [T, k]."""
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


class QuantizedRouter(nn.Module):
    """transformers' router over a quantized Linear."""

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
        with torch.device("meta"):
            experts = UnfusedExperts(model.config)
        for number in range(model.config.num_local_experts):
            w1, w3 = fused.gate_up_proj.detach()[number].chunk(2)
            for name, weight in (("w1", w1), ("w2", fused.down_proj.detach()[number]), ("w3", w3)):
                linear = experts.get_submodule(f"{number}.{name}")
                linear.weight = nn.Parameter(weight.clone(), requires_grad=fused.down_proj.requires_grad)
        layer.mlp.experts = experts.train(model.training)
    model.set_experts_implementation("eager")
    return model
