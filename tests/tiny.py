"""Small random models and texts that every test can use."""

from __future__ import annotations

import inspect

import torch
from transformers import MixtralConfig, MixtralForCausalLM

# What a model calls its cache: transformers 5.24 renamed it, and generate warns of the old name.
CACHE = "cache" if "cache" in inspect.signature(MixtralForCausalLM.forward).parameters else "past_key_values"
# 8x7B and 8x22B, scaled down: the same proportions of layers, heads and experts.
SHAPES = {
    "8x7b": {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1},
    "8x22b": {"num_hidden_layers": 56, "num_attention_heads": 6, "num_key_value_heads": 1},
}


def tiny_mixtral(shape: str = "8x7b", seed: int = 0, **changes: object) -> MixtralForCausalLM:
    """A random Mixtral of a few thousand parameters, whose router is far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        **SHAPES[shape],
        **changes,
    }
    config = MixtralConfig(**settings)
    return MixtralForCausalLM(config).eval()


def matrices_of(experts, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w1 and w3 [I, H] and w2 [H, I] of one expert, fused or with Linears of its own."""
    if hasattr(experts, "gate_up_proj"):
        w1, w3 = experts.gate_up_proj.detach()[expert].chunk(2)
        return w1, w3, experts.down_proj.detach()[expert]
    return tuple(getattr(experts[expert], name).weight.detach() for name in ("w1", "w3", "w2"))


class Letters:
    """A tokenizer of single letters: token id = code point, BOS in front."""

    name_or_path = "letters"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(c) % 120 + 3 for c in text)]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(c): c % 120 + 3 for c in range(32, 127)}
