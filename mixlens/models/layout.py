"""Where transformers puts the parts of a mixture of experts, found by the names of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import MoeModelOutputWithPast

from mixlens.core.text import numbered
from mixlens.errors import BadInput, ModelError
from mixlens.models.families import FAMILIES, LEFT_OUT, UNKNOWN, Family
from mixlens.models.quantization.linears import dequantized
from mixlens.models.quantization.unfuse import is_unfused
from mixlens.models.routing_rule import RouterRule

# What a module is, by the parts of its name; the first that is found holds.
_ROUTERS = ("gate", "router")
_SHARED = ("shared_experts", "shared_expert", "shared_mlp")
_ATTENTION = ("self_attn", "self_attention", "linear_attn", "mamba", "conv")
_KINDS = {
    "experts": "experts",
    **dict.fromkeys(_SHARED, "shared"),
    "shared_expert_gate": "shared",
    **dict.fromkeys((*_ATTENTION, "q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(_ROUTERS, "router"),
    "lm_head": "head",
    "embed_tokens": "embeddings",
    "mlp": "dense",
    "feed_forward": "dense",
}
KINDS = ("attention", "router", "experts", "shared", "dense", "embeddings", "head", "norms")
_SIZES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class MoeLayer:
    """One decoder layer and its parts.

    attention    what mixes tokens, of whatever kind; None where the layer has none, or several
    gate         decides over the flat tokens of a batch, padding included; `read` and `write` tell what it returns
    experts      is called with (hidden [T, H], ids [T, k], weights [T, k]) where `routed` is true
    shared       what every token passes, and
    shared_gate  the Linear whose sigmoid multiplies what it puts out; None where there is none
    """

    index: int
    decoder: nn.Module
    attention: nn.Module | None
    moe: nn.Module
    gate: Any
    experts: nn.Module
    shared: nn.Module | None
    shared_gate: nn.Module | None
    family: Family

    @property
    def routed(self) -> bool:
        return hasattr(self.experts, "_apply_gate") or is_unfused(self.experts)

    @property
    def top_k(self) -> int:
        return int(getattr(self.gate, "top_k", None) or config_of(self.gate).top_k_experts)

    @property
    def router_weight(self) -> torch.Tensor:
        """[E, H], of the router itself or of the Linear inside it."""
        own = getattr(self.gate, "weight", None)
        return next(p for p in self.gate.parameters() if p.ndim == 2) if own is None else own

    @property
    def rule(self) -> RouterRule | None:
        return None if self.family.rule is None else RouterRule(self.family.rule, self.gate, self.moe)

    def read(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [T, E], weights [T, k] and ids [T, k] of what the router returned."""
        if self.family.returns == "scores":
            scores, logits = output
            ids = logits.topk(self.top_k, dim=-1).indices
            return logits, scores.gather(1, ids), ids
        if self.family.returns == "sorted":
            order, _, weights, sizes, logits = output
            experts = torch.arange(len(sizes), device=order.device).repeat_interleave(order.new_tensor(sizes))
            flat = torch.empty_like(order), torch.empty_like(weights)
            ids, spread = (part.scatter(0, order, own) for part, own in zip(flat, (experts, weights), strict=True))
            return logits, spread.view(len(logits), -1), ids.view(len(logits), -1)
        self._check_form(output)
        return output[0], output[1], output[2]

    def _check_form(self, output: Any) -> None:
        """Raise ModelError unless the router returned logits [T, E], weights [T, k] and ids [T, k], in this order."""
        if isinstance(output, tuple | list) and len(output) >= 3:
            logits, weights, ids = output[:3]
            tensors = all(isinstance(part, torch.Tensor) and part.ndim == 2 for part in (logits, weights, ids))
            if tensors and weights.is_floating_point() and not ids.is_floating_point() and weights.shape == ids.shape:
                return
        raise ModelError(
            f"Cannot read the router of layer {self.index}: {type(self.gate).__name__} did not return logits, weights "
            "and ids of experts, in this order, as it does in the transformers that mixlens knows. Update transformers "
            "(docs/compatibility.md lists the versions that were tested).",
            argument="model",
            value=type(self.gate).__name__,
        )

    def write(self, output: Any, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Any:
        """What the router would have returned, had it decided so."""
        if self.family.returns == "scores":
            return torch.zeros_like(logits).scatter(1, ids, weights.to(logits.dtype)), logits
        if self.family.returns == "sorted":
            flat = ids.flatten()
            order = flat.sort(stable=True).indices
            sizes = flat.bincount(minlength=logits.shape[-1]).tolist()
            return order, order // ids.shape[-1], weights.flatten()[order], sizes, logits
        return logits, weights, ids, *output[3:]


# The keyword of a forward for keys and values, and the field of what it returns; renamed in transformers 5.24.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__annotations__ else "past_key_values"


def cache_in(given: Mapping[str, Any]) -> Any:
    """Return the cache among the keywords of a forward, by its name in this transformers or an earlier one, or None."""
    cache = given.get("cache")
    return given.get("past_key_values") if cache is None else cache


def unwrapped(model: Any) -> Any:
    """The transformers model inside what torch.compile, PEFT or data parallelism put round it."""
    while True:
        inner = getattr(model, "_modules", {}).get("_orig_mod")
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None and isinstance(model, nn.DataParallel | DistributedDataParallel):
            inner = model.module
        if inner is None or inner is model:
            return model
        model = inner


def is_part(module: nn.Module, own: nn.Module) -> bool:
    """Whether a module that runs a hook is the one that it was given, or nn.DataParallel's of it, and no copy."""
    return module is own or getattr(module, "_is_replica", False)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of one tensor: tensor, expert or fully sharded parallel."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raises ModelError where the experts of a model are spread over processes, each of which sees its part alone."""
    if is_sharded(model):
        raise ModelError(
            f"Cannot {what}: the weights of this model are sharded over processes, and each sees its part of every "
            "expert alone. Expert ids, weights, router_logits, logprob and the sites resid_pre, resid_post, attn_out, "
            'moe_in and moe_out are whole. For the rest load the model with device_map="auto".',
            argument="model",
            value="sharded",
        )


def refuse_pipeline(model: nn.Module) -> None:
    """Raises ModelError where each process holds some of the layers, and hands its hidden states on to the next."""
    if hasattr(unwrapped(model), "_pp_stage"):
        raise ModelError(
            "Cannot read the layers of this model: processes share them out (pipeline parallel), and each holds some. "
            'Load it with device_map="auto", or with tp_plan="auto" for tensor parallel.',
            argument="model",
            value="pipeline parallel",
        )


def without_prompt(model: Any) -> Any:
    """The same, for who feeds its decoder token ids.

    Raises ModelError where PEFT puts learned tokens before them, and where FSDP lets no part of a model run alone.
    """
    if isinstance(unwrapped(model), FSDPModule):
        raise ModelError(
            "Cannot read documents with a fully sharded model (FSDP2): its decoder does not run without its head. Run "
            'the model yourself inside a Recorder, or load it with device_map="auto".',
            argument="model",
            value="fully sharded",
        )
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        raise ModelError(
            "Cannot read documents with a model that PEFT gives a learned prompt: they would be read without it. Run "
            "the model yourself inside a Recorder, or pass get_base_model() to read without the prompt.",
            argument="model",
            value=type(model).__name__,
        )
    return unwrapped(model)


def decoder_of(model: Any) -> Any:
    """The stack of layers below the language-model head."""
    return getattr(model, "model", model)


def _inside(module: Any) -> Any:
    """A gate or an experts module itself, where PEFT has put an adapter round it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Every mixture-of-experts layer of `model`, in order; layers without experts are left out.

    Raises ModelError when the model has none, or layers that share a router.
    """
    refuse_pipeline(model)
    layers = getattr(decoder_of(model), "layers", None)
    found = [_moe_layer(index, layer) for index, layer in enumerate(layers if layers is not None else ())]
    found = [layer for layer in found if layer is not None]
    if not found:
        reason = LEFT_OUT.get(_folder(model))
        raise ModelError(
            f"Cannot find the experts of a {type(model).__name__}: "
            + (f"{reason}." if reason else "none of its layers has a router beside experts.")
            + " Pass a mixture of experts such as mistralai/Mixtral-8x7B-v0.1.",
            argument="model",
            value=type(model).__name__,
        )
    if len({layer.gate for layer in found}) < len(found):
        raise ModelError(
            "Cannot tell the layers of this model apart: several of them share one router, whose choices belong to "
            "each. Copy the shared layers (copy.deepcopy) first.",
            argument="model",
            value="shared layers",
        )
    return found


def _moe_layer(index: int, layer: nn.Module) -> MoeLayer | None:
    family = FAMILIES.get(_folder(layer), UNKNOWN)
    for block in (layer, *layer.children()):
        gate = next((m for name in _ROUTERS if isinstance(m := getattr(block, name, None), nn.Module)), None)
        experts = getattr(block, "experts", block if family.returns == "sorted" else None)
        if gate is None or not isinstance(experts, nn.Module):
            continue
        mixers = [m for name in _ATTENTION if isinstance(m := getattr(layer, name, None), nn.Module)]
        single = mixers[0] if len(mixers) == 1 and not isinstance(mixers[0], nn.ModuleList) else None
        shared = [m for place in (block, layer) for name in _SHARED if (m := getattr(place, name, None)) is not None]
        return MoeLayer(
            index,
            layer,
            single,
            experts if block is layer else block,
            _inside(gate),
            _inside(experts),
            shared[0] if shared else None,
            getattr(block, "shared_expert_gate", None),
            family,
        )
    return None


def numbered_layers(model: nn.Module, asked: Any, what: str) -> list[MoeLayer]:
    """Layers with experts by their numbers, one or several; all for None. Raises BadInput for others."""
    layers = {layer.index: layer for layer in moe_layers(model)}
    numbers = list(layers) if asked is None else sorted(set(np.atleast_1d(np.asarray(asked)).tolist()))
    if not numbers or not layers.keys() >= set(numbers):
        raise BadInput(
            f"Cannot {what} of layers {asked}: the model has experts in layers {numbered(list(layers))}. Pass "
            "some of them.",
            argument="layers",
            value=asked,
        )
    return [layers[number] for number in numbers]


def _folder(module: nn.Module) -> str:
    """The folder of transformers that defines a module: the name of its family."""
    # Sharding makes a class of its own, whose base is the model's.
    modules = (kind.__module__ for kind in type(module).__mro__)
    return next((name.split(".")[-2] for name in modules if name.startswith("transformers.models.")), "")


def refuse_without_rule(layer: MoeLayer, what: str, *, checked: bool = False) -> None:
    """Raises ModelError: what the weights of other experts would be is not known.

    checked  whether the family has a rule, and this router decided otherwise
    """
    name = type(layer.gate).__name__
    raise ModelError(
        f"Cannot {what}: the rule of this model's routers is unknown ({name} in layer {layer.index}"
        f"{', which decided otherwise than its family does' if checked else ''}), so that edited weights would be "
        "wrong. Record without an edit, or edit what experts put out instead.",
        argument="rule",
        value="unknown",
    )


class _PassedOver(nn.Module):
    """Stands for a decoder layer that does not run; a decoder reads of its layers which masks they take.

    gives  hidden states that it puts out, whatever it reads; None for what it reads
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is no child
        self.gives: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_options: Any) -> torch.Tensor:
        return hidden_states if self.gives is None else self.gives


@contextmanager
def only_layers(model: nn.Module, start: int, stop: int) -> Iterator[Callable[..., Any]]:
    """A function that runs layers `start` to `stop` - 1 of the decoder alone, then its norm, on hidden states.

    Layers keep their places, by which decoders tell those of sliding windows and of linear attention. Where a decoder
    scales embeddings, hidden states kept from before are not scaled again.
    """
    decoder: Any = decoder_of(model)
    layers = decoder.layers
    kept = [layer if start <= index < stop else _PassedOver(layer) for index, layer in enumerate(layers)]

    def run(hidden: torch.Tensor, **options: Any) -> Any:
        if start > 0:
            kept[start - 1].gives = hidden
        return decoder(inputs_embeds=hidden, **options)

    decoder.layers = nn.ModuleList(kept)
    try:
        yield run
    finally:
        decoder.layers = layers


def expert_weights(layer: MoeLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w1 (gate) [E, I, H], w2 (down) [E, H, I] and w3 (up) [E, I, H] of a layer.

    Views of the fused tensors; of experts with Linears of their own copies, dequantized where they are quantized.

    Raises ModelError where they are offloaded, or held in another layout.
    """
    experts: Any = layer.experts
    refuse_sharded(experts, f"read the expert weights of layer {layer.index}")
    refuse_without_experts(layer, "read the expert weights", inside=True)
    biased, gated = (experts.biased, experts.gated) if is_unfused(experts) else (experts.has_bias, experts.has_gate)
    if biased or not gated:
        raise ModelError(
            f"Cannot read the expert weights of layer {layer.index} as three matrices: a "
            f"{type(experts).__name__} has biases, or no gate. Compare what experts put out instead.",
            argument="layer",
            value=layer.index,
        )
    if layer.moe.experts is not experts:
        raise ModelError(
            f"Cannot read the expert weights of layer {layer.index}: an adapter is applied to them in each forward. "
            "Merge it first, with merge_and_unload().",
            argument="layer",
            value=layer.index,
        )
    if is_unfused(experts) and not any(p.is_meta for p in experts.parameters()):
        w1, w2, w3 = (
            torch.stack([dequantized(getattr(expert, name)) for expert in experts]) for name in ("w1", "w2", "w3")
        )
        return w1, w2, w3
    fused, down = (getattr(layer.experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(fused, torch.Tensor) or not isinstance(down, torch.Tensor) or fused.is_meta or down.is_meta:
        raise ModelError(
            f"Cannot read the expert weights of layer {layer.index}: they are offloaded, or in a layout that mixlens "
            'does not know. Load the whole model with ml.load(..., device_map="cpu").',
            argument="layer",
            value=layer.index,
        )
    fused, down = (fused.mT, down.mT) if experts.is_transposed else (fused, down)
    w1, w3 = fused.chunk(2, dim=1) if experts.is_concatenated else (fused[:, ::2], fused[:, 1::2])
    return w1, down, w3


def expert_neurons(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What stands between the two halves of one expert [n, I], from hidden states [n, H], whatever the layout.

    Where accelerate offloads fused experts: only inside their forward.
    """
    if is_unfused(experts):
        return experts[expert].neurons(hidden)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _projected(experts, name, expert, hidden)
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)


def expert_down(experts: Any, expert: int, neurons: torch.Tensor) -> torch.Tensor:
    """Output of one expert [n, H], before its weight, from its neurons [n, I]."""
    if is_unfused(experts):
        return experts[expert].w2(neurons)
    if experts.down_proj.is_meta:
        raise ModelError(
            f"Cannot compute the output of expert {expert} from its neurons: the weights are offloaded, and only the "
            'forward of all experts fetches them. Load the whole model, as by ml.load(..., device_map="cpu").',
            argument="expert",
            value=expert,
        )
    return _projected(experts, "down_proj", expert, neurons)


def widths_of(layer: MoeLayer) -> tuple[int, int]:
    """Numbers that an expert puts out, and neurons between its two halves."""
    experts: Any = layer.experts
    if is_unfused(experts):
        return experts.hidden_dim, experts.intermediate_dim
    *_, first, second = experts.down_proj.shape
    return (second, first) if experts.is_transposed else (first, second)


def _projected(experts: Any, name: str, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(inputs, weight.T if experts.is_transposed else weight, bias)


def refuse_indirect(model: nn.Module, what: str) -> None:
    """Raises ModelError unless every layer adds what its experts put out to the residual stream as it is."""
    layers = moe_layers(model)
    if not all(layer.family.direct for layer in layers):
        raise ModelError(
            f"Cannot {what} of a {type(model).__name__}: it is not known to add what its experts put out to the "
            "residual stream as it is, and to end in a norm that is linear but for its scale. Measure importance, or "
            "put edits.ablate round the model, and compare.",
            argument="model",
            value=type(model).__name__,
        )
    if layers[-1].index != len(decoder_of(model).layers) - 1:
        raise ModelError(
            f"Cannot {what} of a {type(model).__name__}: its last layer has no experts, and the scale of the last norm "
            "is read there. Measure importance instead.",
            argument="model",
            value=type(model).__name__,
        )


def refuse_without_experts(layer: MoeLayer, what: str, *, inside: bool) -> None:
    """Raises ModelError where experts are no module that is told ids and weights.

    inside  whether what single experts compute must be known, which is two products with neurons between them
    """
    known = layer.routed and not getattr(layer.experts, "has_post_expert_norm", False)
    if not known if inside else layer.family.returns != "triple":
        raise ModelError(
            f"Cannot {what} in layer {layer.index}: its {type(layer.experts).__name__} does not compute expert by "
            "expert as transformers' interface of experts does. Sites of whole layers, such as moe_out, are there.",
            argument="layer",
            value=layer.index,
        )


def final_scale(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the last norm multiplies hidden states [T, H] by, element by element: [T, H] float32.

    The norm is linear once its root mean square is held fixed.
    """
    norm: Any = decoder_of(model).norm
    hidden = hidden.float()
    return norm.weight.float() * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def kind_of(name: str) -> str:
    """What a module of this name is: one of KINDS, or other."""
    parts = name.split(".")
    if parts[-1].endswith("norm"):
        return "norms"
    return next((kind for part, kind in _KINDS.items() if part in parts), "other")


def n_experts(model: nn.Module) -> int:
    """Experts of a layer, as the routers have it; those that a router can choose, identities among them."""
    found = {_n_choices(layer.gate) or _experts_in(config_of(model)) for layer in moe_layers(model)}
    return max(found)


def _n_choices(gate: Any) -> int:
    return int(getattr(gate, "n_routed_experts", None) or getattr(gate, "num_experts", None) or 0)


def _experts_in(config: Any) -> int:
    sizes = (getattr(config, name, None) for name in _SIZES)
    return next((size if isinstance(size, int) else max(size) for size in sizes if size), 0)


def top_k(model: nn.Module) -> dict[int, int]:
    """{layer: experts that a token chooses}, as the routers have it: a config is not read again once they are made."""
    return {layer.index: layer.top_k for layer in moe_layers(model)}


def check_config(config: Any, name: str) -> None:
    """Raise ModelError unless `config` is that of a mixture of experts that transformers can generate with."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if _experts_in(config) < 2 or config.model_type in LEFT_OUT:
        reason = LEFT_OUT.get(config.model_type, "it is not a mixture of experts")
        raise ModelError(
            f"Cannot load {name}, a {config.model_type} model: {reason}. Pass a mixture of experts such as "
            "mistralai/Mixtral-8x7B-v0.1.",
            argument="model_type",
            value=config.model_type,
        )
    if config.model_type == "mixtral" and getattr(config, "sliding_window", None) is not None:
        raise ModelError(
            f"Cannot load {name}: its config has sliding_window={config.sliding_window}, and Mixtral has no sliding "
            "window; attention would silently see less. Set sliding_window to null in config.json if the weights are "
            "Mixtral's; otherwise use the library that the model was made with.",
            argument="sliding_window",
            value=config.sliding_window,
        )


def context_length(model: nn.Module) -> int:
    return int(config_of(model).max_position_embeddings)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the embedding, or the one accelerate moves it to."""
    embedding = decoder_of(model).get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(embedding.parameters()).device


def config_of(model: nn.Module) -> Any:
    """The config of the text model."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if config is None or not _experts_in(config):
        raise ModelError(
            f"Expected a mixture of experts, got a {type(model).__name__} whose config names no experts. Pass a "
            "mixture of experts such as mistralai/Mixtral-8x7B-v0.1.",
            argument="model",
            value=type(model).__name__,
        )
    return config
