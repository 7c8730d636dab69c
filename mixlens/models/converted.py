"""Checkpoints whose tensors transformers joins when it loads them: on disk, by the names of an unfused model."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from transformers import AutoModelForCausalLM

from mixlens.errors import BadInput, ModelError
from mixlens.models.layout import kind_of, moe_layers, refuse_without_experts
from mixlens.models.quantization.checkpoint import Skeleton, tied
from mixlens.models.quantization.schemes import Quantization, schemes_of
from mixlens.models.quantization.unfuse import UnfusedExperts, part_of

_OF_AN_EXPERT = re.compile(r"(.+)\.(\d+)\.(w[123])\.(weight|bias)")
_AT_HAND = 4  # tensors of all experts of a layer: two matrices, and their biases
_MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "hpu")  # which accelerate replaces with ones that warn


@dataclass
class Converted:
    """The tensors of a model on disk, by the names that an unfused model gives them.

    maps   {module: its own tensors by name}, read when they are asked for
    fused  {name of a module: the experts that were there}
    """

    folder: str
    maps: dict[str, Any]
    fused: dict[str, Any]
    tensors: set[str]

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        """A function from a name to its tensor; the last few stay at hand, since all experts of a layer are one."""
        kept: OrderedDict[str, torch.Tensor] = OrderedDict()

        def stored(module: str, own: str) -> torch.Tensor:
            name = f"{module}.{own}"
            if name not in kept:
                kept[name] = self.maps[module][own]
                if len(kept) > _AT_HAND:
                    kept.popitem(last=False)
            return kept[name]

        def read(name: str) -> torch.Tensor:
            found = _OF_AN_EXPERT.fullmatch(name)
            if found is not None and found[1] in self.fused:
                module, expert, matrix, own = found.groups()
                return part_of(self.fused[module], lambda n: stored(module, n), int(expert), matrix, own)
            return stored(*name.rsplit(".", 1))

        yield read


@contextlib.contextmanager
def converted(
    name: str, asked: str, config: Any, revision: str | None, dtype: torch.dtype, quantization: Quantization
) -> Iterator[tuple[Skeleton, Converted]]:
    """A model whose experts are Linears without weights, with their schemes, and where its weights lie until then.

    transformers writes to a temporary folder what it joins, so that the model never stands in memory whole.

    Raises ModelError for families whose experts are no products of matrices alone, and for missing weights;
    BadInput for schemes of routers.
    """
    with tempfile.TemporaryDirectory(prefix="mixlens-converted-", ignore_cleanup_errors=True) as folder:
        read: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": "disk"},
            offload_folder=folder,
            output_loading_info=True,
        )
        model, info = read
        if missing := sorted(set(info["missing_keys"]) - tied(model)):
            raise ModelError(
                f"Cannot load {asked}: its checkpoint lacks {len(missing)} weights ({', '.join(missing[:3])} ...), "
                "which transformers would leave random. Complete the checkpoint, or download it again.",
                argument="weights",
                value=missing,
            )
        maps = {
            module: part._hf_hook.weights_map
            for module, part in model.named_modules()
            if getattr(getattr(part, "_hf_hook", None), "weights_map", None) is not None
        }
        remove_hook_from_module(model, recurse=True)
        for attribute in (*_MOVERS, "hf_device_map"):
            vars(model).pop(attribute, None)
        fused = _unfuse(model)
        schemes = schemes_of(model, quantization)
        if routers := [own for own in schemes if kind_of(own) == "router"]:
            raise BadInput(
                f"Cannot quantize the router {routers[0]}: of other families than Mixtral, routers compute with their "
                "weights themselves. Leave routers out.",
                argument="quantization",
                value="router",
            )
        tensors = {own for own, _ in model.named_parameters()}
        yield Skeleton(model.eval(), schemes), Converted(asked, maps, fused, tensors)


def _unfuse(model: Any) -> dict[str, Any]:
    """Put Linears without weights in the place of all experts; gives those that were there, by name."""
    names = {module: name for name, module in model.named_modules()}
    fused = {}
    for layer in moe_layers(model):
        refuse_without_experts(layer, "quantize the experts", inside=True)
        name = names[layer.experts]
        fused[name] = layer.experts
        model.set_submodule(name, UnfusedExperts(layer.experts.config, layer.experts))
    model.set_experts_implementation("eager")
    return fused
