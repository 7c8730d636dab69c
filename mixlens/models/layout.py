"""Where transformers puts the parts of a mixture of experts. The one file that knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from mixlens.errors import ModelError
from mixlens.models.quantization.linears import dequantized
from mixlens.models.quantization.unfuse import is_unfused

# What a module is, by the parts of its name; the first that is found holds.
_KINDS = {
    "experts": "experts",
    "gate": "router",
    "self_attn": "attention",
    "lm_head": "head",
    "embed_tokens": "embeddings",
    "norm": "norms",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
}
KINDS = ("attention", "router", "experts", "embeddings", "head", "norms")


@dataclass(frozen=True)
class MoeLayer:
    """One decoder layer and its parts.

    gate     gives (logits [T, E], weights [T, k] float32, ids [T, k]) over the flat tokens of a batch, padding included
    experts  is called with (hidden [T, H], ids [T, k], weights [T, k])
    """

    index: int
    decoder: nn.Module
    attention: nn.Module
    moe: nn.Module
    gate: Any
    experts: nn.Module


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
    """Every mixture-of-experts layer of `model`, in order.

    Raises ModelError when the model has none, has layers without experts, or layers that share a router.
    """
    refuse_pipeline(model)
    layers = getattr(decoder_of(model), "layers", None)
    found = [
        MoeLayer(index, layer, layer.self_attn, layer.mlp, _inside(layer.mlp.gate), _inside(layer.mlp.experts))
        for index, layer in enumerate(layers if layers is not None else ())
        if hasattr(getattr(layer, "mlp", None), "gate") and hasattr(layer.mlp, "experts")
    ]
    if layers is None or not found or len(found) != len(layers):
        raise ModelError(
            f"Cannot find the experts of a {type(model).__name__}: {len(found)} of its "
            f"{len(layers) if layers is not None else 0} layers are mixture-of-experts layers. Pass a Mixtral model, "
            "such as mistralai/Mixtral-8x7B-v0.1.",
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


def check_router(layers: list[MoeLayer]) -> None:
    """Raises ModelError unless the gates decide as Mixtral's do, whose weights are a softmax over the chosen logits."""
    for layer in layers:
        if not isinstance(layer.gate, MixtralTopKRouter):
            raise ModelError(
                f"Cannot edit the routing of this model: its gate is a {type(layer.gate).__name__}, whose weights "
                "follow another rule than Mixtral's, so edited weights would be wrong. Pass a Mixtral model, or record "
                "without an edit.",
                argument="model",
                value=type(layer.gate).__name__,
            )


@contextmanager
def only_layers(model: nn.Module, start: int, stop: int) -> Iterator[None]:
    """The decoder runs layers `start` to `stop` - 1 alone, then its norm: for hidden states kept from before."""
    decoder: Any = decoder_of(model)
    layers = decoder.layers
    decoder.layers = nn.ModuleList(layers[start:stop])
    try:
        yield
    finally:
        decoder.layers = layers


def expert_weights(layer: MoeLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w1 (gate) [E, I, H], w2 (down) [E, H, I] and w3 (up) [E, I, H] of a layer.

    Views of the fused tensors; of experts with Linears of their own copies, dequantized where they are quantized.

    Raises ModelError where they are offloaded, or held in another layout.
    """
    experts: Any = layer.experts
    refuse_sharded(experts, f"read the expert weights of layer {layer.index}")
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
    w1, w3 = fused.chunk(2, dim=1)
    return w1, down, w3


def expert_neurons(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What stands between the two halves of one expert [n, I], from hidden states [n, H], whatever the layout.

    Where accelerate offloads fused experts: only inside their forward.
    """
    if is_unfused(experts):
        return experts[expert].neurons(hidden)
    gate, up = F.linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


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
    return F.linear(neurons, experts.down_proj[expert])


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
    return next((kind for part, kind in _KINDS.items() if part in parts), "other")


def n_experts(model: nn.Module) -> int:
    return int(config_of(model).num_local_experts)


def top_k(model: nn.Module) -> dict[int, int]:
    """{layer: experts that a token chooses}, as the routers have it: a config is not read again once they are made."""
    return {layer.index: int(layer.gate.top_k) for layer in moe_layers(model)}


def check_config(config: Any, name: str) -> None:
    """Raise ModelError unless `config` is that of a Mixtral as mixlens knows it."""
    if getattr(config, "num_local_experts", 0) < 2 or config.model_type != "mixtral":
        raise ModelError(
            f"Cannot load {name}: it is a {config.model_type} "
            f"model{'' if getattr(config, 'num_local_experts', 0) >= 2 else ', not a mixture of experts'}. Pass a "
            "Mixtral model, such as mistralai/Mixtral-8x7B-v0.1.",
            argument="model_type",
            value=config.model_type,
        )
    if getattr(config, "sliding_window", None) is not None:
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
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_local_experts"):
        raise ModelError(
            f"Expected a mixture of experts, got a {type(model).__name__} whose config names no experts. Pass a "
            "Mixtral model, such as mistralai/Mixtral-8x7B-v0.1.",
            argument="model",
            value=type(model).__name__,
        )
    return config
