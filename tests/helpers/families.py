"""A tiny random model of every family, and its router's formula in loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from mixlens.models.families import FAMILIES, LEFT_OUT

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 128,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LATENT = {"num_key_value_heads": 4, "head_dim": None}  # multi-head latent attention has one head for each key
LINEAR = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
NARROW = {f"linear_{name}": 2 for name in ("num_value_heads", "num_key_heads")} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

Chosen = list[tuple[int, float]]
Formula = Callable[[list[float], "Numbers"], Chosen]


@dataclass
class Numbers:
    """Of one router: its choices, and what its formula adds, groups and multiplies by."""

    k: int
    bias: list[float]
    groups: int = 1
    kept: int = 1
    normed: bool = True
    scale: float = 1.0
    jitter: float = 0.0
    banned: frozenset[int] = frozenset()
    forced: frozenset[int] = frozenset()


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def best(ranks: list[float], n: Numbers, allowed: set[int]) -> list[int]:
    order = sorted(allowed - n.banned - n.forced, key=lambda expert: -ranks[expert])
    return sorted([*n.forced, *order][: n.k], key=lambda expert: -ranks[expert])


def every(logits: list[float]) -> set[int]:
    return set(range(len(logits)))


def normed(scores: list[float], n: Numbers, chosen: list[int]) -> Chosen:
    total = sum(scores[expert] for expert in chosen) if n.normed else 1.0
    return [(expert, n.scale * scores[expert] / total) for expert in chosen]


def of_softmax(logits: list[float], n: Numbers) -> Chosen:
    scores = softmax(logits)
    return normed(scores, n, best([s + b for s, b in zip(scores, n.bias, strict=True)], n, every(logits)))


def of_sigmoid(logits: list[float], n: Numbers) -> Chosen:
    scores = [sigmoid(logit) for logit in logits]
    return normed(scores, n, best([s + b for s, b in zip(scores, n.bias, strict=True)], n, every(logits)))


def after_top_k(logits: list[float], n: Numbers) -> Chosen:
    chosen = best(logits, n, every(logits))
    return list(zip(chosen, softmax([logits[expert] for expert in chosen]), strict=True))


def in_groups(scores: list[float], n: Numbers, pair: int) -> Chosen:
    ranks = [s + b - (math.inf if e in n.banned else 0) for e, (s, b) in enumerate(zip(scores, n.bias, strict=True))]
    size = len(ranks) // n.groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(n.groups)]
    worth = [sum(sorted((ranks[expert] for expert in group), reverse=True)[:pair]) for group in members]
    kept = sorted(range(n.groups), key=lambda group: -worth[group])[: n.kept]
    return normed(scores, n, best(ranks, n, {expert for group in kept for expert in members[group]}))


def deepseek_v3(logits: list[float], n: Numbers) -> Chosen:
    return in_groups([sigmoid(logit) for logit in logits], n, 2)


def deepseek_v2(logits: list[float], n: Numbers) -> Chosen:
    return in_groups(softmax(logits), n, 1)


def mistral(logits: list[float], n: Numbers) -> Chosen:
    return in_groups(softmax(logits), n, 2)


def llama4(logits: list[float], n: Numbers) -> Chosen:
    return [(expert, sigmoid(logits[expert])) for expert in best(logits, n, every(logits))]


def kolibri(logits: list[float], n: Numbers) -> Chosen:
    ranks = [logit + b for logit, b in zip(logits, n.bias, strict=True)]
    return normed([sigmoid(logit) for logit in logits], n, best(ranks, n, every(logits)))


def sparsemixer(logits: list[float], n: Numbers) -> Chosen:
    found: Chosen = []
    for expert in best(logits, n, every(logits)):
        free = every(logits) - {taken for taken, _ in found}
        near = [
            other
            for other in sorted(free)
            if (logits[expert] - logits[other]) / max(abs(logits[other]), logits[expert]) <= 2 * n.jitter
        ]
        found.append((expert, softmax([logits[other] for other in near])[near.index(expert)]))
    return found


@dataclass(frozen=True)
class Case:
    """One family: its model type, its router's formula, and what its config has beside COMMON.

    numbers  {part of Numbers: attribute of the router, or its value}
    bias     path of the selection bias from the router or the block
    """

    name: str
    formula: Formula
    config: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    bias: str | None = None
    type: str | None = None
    dense: int = 0

    def model(self, seed: int = 0) -> Any:
        kind = CONFIG_MAPPING[self.type or self.name]
        known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
        settings = {key: value for key, value in {**COMMON, **self.config}.items() if key in known}
        settings = {key: value for key, value in settings.items() if kind.attribute_map.get(key) not in settings}
        torch.manual_seed(seed)
        file = import_module(kind.__module__.replace("configuration_", "modeling_"))
        named = (getattr(file, own) for own in file.__all__ if own.endswith("ForCausalLM"))
        model: Any = next(one for one in named if one.config_class in (kind, None))(kind(**settings)).eval()
        with torch.no_grad():
            for name, values in (*model.named_parameters(), *model.named_buffers()):
                if (
                    name.endswith(("expert_bias", "e_score_correction_bias"))
                    or ".gate." in name
                    or ".router." in name
                    or ".experts." in name
                ):
                    values.normal_(0, 0.3)
        return model

    def of(self, router: Any, block: Any, experts: int) -> Numbers:
        parts = {part: getattr(router, own) if isinstance(own, str) else own for part, own in self.numbers.items()}
        bias = self.bias_of(router, block)
        return Numbers(router.top_k, [0.0] * experts if bias is None else bias.flatten().tolist(), **parts)

    def bias_of(self, router: Any, block: Any) -> torch.Tensor | None:
        for place in (router, block) if self.bias else ():
            for name in self.bias.split("."):
                place = getattr(place, name, None)
            if place is not None:
                return place
        return None


GROUPED = {"groups": "num_group", "kept": "topk_group", "normed": "norm_topk_prob", "scale": "routed_scaling_factor"}
NORMED = {"normed": "norm_topk_prob"}
CORRECTION = "e_score_correction_bias"


def deepseek(name: str, **changes: Any) -> Case:
    return Case(name, deepseek_v3, {"routed_scaling_factor": 2.5, **changes}, GROUPED, CORRECTION)


# {verb: its column in docs/models.md}
VERBS = {"quantize": "quantize", "benchmark": "bytes", "importance": "importance", "contributions": "contributions"}

_OWN_LAYOUT = frozenset({"jetmoe", "llama4"})  # experts that are not called as transformers' interface has it
# {verb: families that it refuses}, which tests/models/test_every_verb.py holds to be all of them.
REFUSED = {
    "quantize": _OWN_LAYOUT | {"mistral4"},  # which AutoModelForCausalLM does not load
    "benchmark": _OWN_LAYOUT | {"minimax"},  # whose cache a CompiledRecorder cannot follow
    "contributions": {name for name, family in FAMILIES.items() if not family.direct},
    "outputs": _OWN_LAYOUT,
    "impact": _OWN_LAYOUT,
    "similarity": _OWN_LAYOUT | {"gpt_oss", "nemotron_h"},  # biases; no gate
    "compiled": {"minimax"},
}


def table() -> str:
    """The table of docs/models.md."""
    tested = {case.name for case in CASES}
    rows = [
        f"| family | its routers decide by | record | edit | {' | '.join(VERBS.values())} | tested | remark |",
        "|---" * (len(VERBS) + 6) + "|",
    ]
    for name, family in sorted(FAMILIES.items()):
        parts = [
            name,
            str(family.rule or "another rule"),
            "yes",
            "yes" if family.rule else "experts' outputs",
            *("" if name not in tested else "no" if name in REFUSED.get(verb, ()) else "yes" for verb in VERBS),
            "yes" if name in tested else "",
            family.remark or "",
        ]
        rows.append(f"| {' | '.join(parts)} |")
    blank = " | " * (len(VERBS) + 4)
    rows += [f"| {name} |{blank}| {reason} |" for name, reason in sorted(LEFT_OUT.items())]
    return "\n".join(rows)


CASES = [
    Case("mixtral", of_softmax),
    Case("phimoe", sparsemixer, {"router_jitter_noise": 0.3}, {"jitter": "router_jitter_noise"}),
    Case("olmoe", of_softmax, {}, NORMED),
    Case("flex_olmo", of_softmax, {}, NORMED),
    Case("qwen2_moe", of_softmax, {}, NORMED),
    Case("qwen3_moe", of_softmax, {"norm_topk_prob": True}, NORMED),
    Case("qwen3_next", of_softmax, LINEAR | NARROW, NORMED),
    Case("qwen3_5_moe", of_softmax, LINEAR | NARROW, type="qwen3_5_moe_text"),
    Case(
        "deepseek_v2",
        deepseek_v2,
        LATENT | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
        {"groups": "num_group", "kept": "topk_group", "normed": False, "scale": "routed_scaling_factor"},
        dense=1,
    ),
    deepseek("deepseek_v3", **LATENT),
    deepseek("axk1", **LATENT),
    deepseek("dots1"),
    deepseek("exaone_moe"),
    deepseek("glm4_moe"),
    deepseek("glm4_moe_lite", **LATENT),
    deepseek("mimo_v2_flash"),
    deepseek("nemotron_h"),
    deepseek("solar_open"),
    Case("mistral4", mistral, LATENT | {"routed_scaling_factor": 2.5}, GROUPED),
    Case("gpt_oss", after_top_k),
    Case("aria", after_top_k, type="aria_text"),
    Case("granitemoe", after_top_k),
    Case("granitemoe_swa", after_top_k),
    Case("granitemoeshared", after_top_k),
    Case(
        "granitemoehybrid",
        after_top_k,
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 24,
        },
    ),
    Case(
        "jamba",
        of_softmax,
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        {"normed": False},
    ),
    Case("jetmoe", after_top_k),
    Case("minimax", of_softmax),
    Case("minimax_m2", of_sigmoid, bias=CORRECTION),
    Case("llama4", llama4, type="llama4_text"),
    Case("ernie4_5_moe", of_softmax, bias=f"moe_statics.{CORRECTION}"),
    Case("hunyuan_v1_moe", of_softmax),
    Case(
        "lfm2_moe",
        of_sigmoid,
        {"layer_types": ["conv", "full_attention", "full_attention"]},
        {"normed": "norm_topk_prob", "scale": "routed_scaling_factor"},
        bias="expert_bias",
    ),
    Case("afmoe", of_sigmoid, {"route_scale": 1.5}, {"scale": "route_scale"}, bias="expert_bias"),
    Case("hy_v3", of_sigmoid, {}, {"scale": "router_scaling_factor"}, bias=CORRECTION),
    Case("laguna", of_sigmoid, bias=CORRECTION),
    Case("flint", of_sigmoid, {}, NORMED),
    Case("kolibri1", kolibri, {}, NORMED, bias=CORRECTION),
    Case("mellum", of_softmax, {}, NORMED),
]


if __name__ == "__main__":
    print(table())
