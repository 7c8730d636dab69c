"""The tables of 8x7b.md: bytes computed from the architecture and the schemes; `python docs/needs.py` prints them."""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixlens.models.layout import kind_of
from mixlens.models.quantization.linears import SCHEMES
from mixlens.recording.estimate import bytes_of_token
from mixlens.trace.signals import Site, parse_signals

_SCHEMES = ("float32", "bfloat16", "int8", "nf4", "hqq3", "hqq2")
_BITS = {"float32": 32.0, "bfloat16": 16.0, **{name: scheme.bits_with_scales for name, scheme in SCHEMES.items()}}
_CONTEXT = 4096
_SIGNALS = (
    ("ids and weights", []),
    ("plus log-probabilities and router logits", ["logprob", "router_logits"]),
    ("plus the 64 most probable next tokens", ["logprob", "router_logits", "top_logprobs"]),
    ("plus the outputs of one layer", ["logprob", "router_logits", Site("moe_out", layers=(16,))]),
)


def tables() -> str:
    config = MixtralConfig()  # of transformers: the shape of 8x7B
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = kind_of(name)
        counts[kind] = counts.get(kind, 0) + parameter.numel()
    quantized = counts["experts"] + counts["attention"]
    rest = sum(counts.values()) - quantized
    head = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head * _CONTEXT
    embeddings = config.vocab_size * config.hidden_size  # of which a token reads one row
    active = counts["experts"] * config.num_experts_per_tok / config.num_local_experts + counts["attention"]
    rows = ["| scheme | weights [GB] | with keys and values of 4,096 tokens [GB] | read per token [GB] |"]
    rows += ["|---|---|---|---|"]
    for scheme in _SCHEMES:
        bits = _BITS[scheme]
        other = 4 if scheme == "float32" else 2
        held, read = quantized * bits / 8 + rest * other, active * bits / 8 + (rest - embeddings) * other
        rows.append(f"| {scheme} | {held / 1e9:.1f} | {(held + cached * other) / 1e9:.1f} | {read / 1e9:.1f} |")
    rows += ["", "| recorded | bytes per token | million tokens [GB] |", "|---|---|---|"]
    layers = range(config.num_hidden_layers)
    for what, signals in _SIGNALS:
        size = bytes_of_token(model, parse_signals(signals, list(layers)))
        rows.append(f"| {what} | {size:,} | {size / 1e3:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(tables())
