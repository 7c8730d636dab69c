"""The families of mixtures of experts that mixlens knows, by their folder in transformers: one entry each."""

from __future__ import annotations

from dataclasses import dataclass

from mixlens.models.routing_rule import Groups, Rule


@dataclass(frozen=True)
class Family:
    """What cannot be read off a model's modules.

    Parameters
    ----------
    rule : Rule, optional
        How routers decide; None where no rule of these parts does.
    returns : str
        What a router returns: "triple" of logits [T, E], weights [T, k] and ids [T, k]; "scores" [T, E], zero for
        experts not chosen, and logits; "sorted", the choices in the order of experts.
    direct : bool
        Whether what the experts put out reaches the last norm as it is, weighted and added.
    remark : str, optional
        What a user should know of the family.
    """

    rule: Rule | None
    returns: str = "triple"
    direct: bool = False
    remark: str | None = None

    @property
    def ordered(self) -> bool:
        """Whether the slots that a router returns are in the order of weights, the largest first."""
        return self.rule is not None and self.rule.bias is None and self.rule.groups is None


UNKNOWN = Family(None)

_RENORMALISED = Rule(renormalised=True)
_OPTIONAL = Rule(renormalised="norm_topk_prob")
_CHOSEN = Rule(ranked="logit")
_DEEPSEEK_V3 = Rule(
    "sigmoid",
    bias="e_score_correction_bias",
    groups=Groups("pair"),
    renormalised="norm_topk_prob",
    scale="routed_scaling_factor",
)
_BIASED_SIGMOID = Rule("sigmoid", bias="e_score_correction_bias", renormalised=True)

FAMILIES = {
    "afmoe": Family(Rule("sigmoid", bias="expert_bias", renormalised=True, scale="route_scale")),
    "aria": Family(_CHOSEN),
    "axk1": Family(_DEEPSEEK_V3),
    "bailing_hybrid": Family(_DEEPSEEK_V3),
    "cohere2_moe": Family(Rule("expert_selection_fn", ranked="logit", renormalised="norm_topk_prob")),
    "deepseek_v2": Family(
        Rule(groups=Groups("best", only=("topk_method", "group_limited_greedy")), scale="routed_scaling_factor"),
        direct=True,
    ),
    "deepseek_v3": Family(_DEEPSEEK_V3, direct=True),
    "deepseek_v32": Family(_DEEPSEEK_V3),
    "dots1": Family(_DEEPSEEK_V3, direct=True),
    "ernie4_5_moe": Family(Rule(bias="moe_statics.e_score_correction_bias", renormalised=True), direct=True),
    "exaone_moe": Family(_DEEPSEEK_V3),
    "flex_olmo": Family(_OPTIONAL),
    "flint": Family(Rule("sigmoid", renormalised="norm_topk_prob")),
    "glm4_moe": Family(_DEEPSEEK_V3, direct=True),
    "glm4_moe_lite": Family(_DEEPSEEK_V3),
    "glm_moe_dsa": Family(_DEEPSEEK_V3),
    "gpt_oss": Family(_CHOSEN, direct=True),
    "granitemoe": Family(_CHOSEN),
    "granitemoe_swa": Family(_CHOSEN),
    "granitemoehybrid": Family(_CHOSEN),
    "granitemoeshared": Family(_CHOSEN),
    "hunyuan_v1_moe": Family(_RENORMALISED, direct=True),
    "hy_v3": Family(
        Rule("sigmoid", bias="e_score_correction_bias", renormalised=True, scale="router_scaling_factor"),
    ),
    "jamba": Family(Rule()),
    "jetmoe": Family(_CHOSEN, returns="sorted", remark="its mixtures of attention heads are not recorded"),
    "kimi_linear": Family(_DEEPSEEK_V3),
    "kolibri1": Family(
        Rule("sigmoid", ranked="logit", bias="e_score_correction_bias", renormalised="norm_topk_prob"),
    ),
    "laguna": Family(_BIASED_SIGMOID, remark="the block multiplies what its experts put out once more"),
    "lfm2_moe": Family(
        Rule("sigmoid", bias="expert_bias", renormalised="norm_topk_prob", scale="routed_scaling_factor")
    ),
    "llama4": Family(
        Rule("sigmoid", ranked="logit"),
        returns="scores",
        remark="weights multiply what experts read, and every expert reads every token",
    ),
    "longcat_flash": Family(
        Rule(bias="e_score_correction_bias", scale="routed_scaling_factor"),
        remark="the last experts are identities, which have no weights",
    ),
    "mellum": Family(_OPTIONAL),
    "mimo_v2_flash": Family(_DEEPSEEK_V3),
    "minimax": Family(_RENORMALISED),
    "minimax_m2": Family(_BIASED_SIGMOID),
    "minimax_m3_vl": Family(_BIASED_SIGMOID),
    "mistral4": Family(Rule(groups=Groups("pair"), renormalised="norm_topk_prob", scale="routed_scaling_factor")),
    "mixtral": Family(_RENORMALISED, direct=True),
    "nemotron_h": Family(_DEEPSEEK_V3, remark="experts may read and write a narrower space"),
    "olmoe": Family(_OPTIONAL, direct=True),
    "phimoe": Family(Rule("sparsemixer", ranked="logit")),
    "qwen2_moe": Family(_OPTIONAL, direct=True),
    "qwen3_5_moe": Family(_RENORMALISED),
    "qwen3_moe": Family(_OPTIONAL, direct=True),
    "qwen3_next": Family(_OPTIONAL),
    "solar_open": Family(_DEEPSEEK_V3),
    # Recorded, and no more.
    "axk2": Family(None, remark="experts of other groups are ranked at 0, so that they may be chosen"),
    "gemma4": Family(None, remark="its routers return probabilities, and scale each expert by a number of its own"),
    "inkling": Family(None, remark="shared experts take part in the softmax of the weights"),
    "zaya": Family(None, remark="routers read what the router of the layer before has read, and may choose no expert"),
}

# Mixtures of experts in transformers that cannot be had, and why.
LEFT_OUT = {
    "dbrx": "its routers return logits alone, and the choice is made by the block",
    "deepseek_v4": "its first layers choose by token id, and the residual stream has several copies",
    "nllb_moe": "an encoder and a decoder, with a capacity that drops tokens",
    "switch_transformers": "an encoder and a decoder, with a capacity that drops tokens",
}
