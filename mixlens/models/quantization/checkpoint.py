"""Load a checkpoint into a model with quantized Linears, tensor by tensor, so that it never stands in memory whole."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import CustomDtype, get_balanced_memory
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.hub import cached_file

from mixlens.errors import BadInput, ModelError
from mixlens.models.quantization.compressed_tensors import CompressedFormat
from mixlens.models.quantization.gptq_awq import PackedFormat
from mixlens.models.quantization.linears import Scheme, quantize_linear, require
from mixlens.models.quantization.schemes import Quantization, schemes_of
from mixlens.models.quantization.unfuse import QuantizedRouter, UnfusedExperts

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What a checkpoint may call a part, and what the model does.
_RENAMED = {".block_sparse_moe.": ".mlp.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}


@dataclass
class Checkpoint:
    """Where each tensor of a checkpoint lies, by the name that an unfused model gives it.

    tensors  {name: (file, name in the file)}
    """

    folder: str
    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str, revision: str | None) -> Checkpoint:
        """Raises OSError where there are no safetensors."""
        index = _file(name, _INDEX, revision, required=False)
        if index is not None:
            files = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
        else:
            files = [_SINGLE]
        found = cls(name)
        for file in files:
            path = str(_file(name, file, revision, required=True))
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    found.tensors[_renamed(key)] = (path, key)
        return found

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        """A function from a name to its tensor. Files are mapped until the end, then their pages are given back."""
        opened: dict[str, Any] = {}

        def read(name: str) -> torch.Tensor:
            path, key = self.tensors[name]
            if path not in opened:
                opened[path] = safe_open(path, "pt").__enter__()
            return opened[path].get_tensor(key)

        try:
            yield read
        finally:
            for file in opened.values():
                file.__exit__(None, None, None)


class Source(Protocol):
    """Where the weights of an unfused model are read."""

    folder: str

    @property
    def tensors(self) -> Collection[str]: ...

    def reading(self) -> contextlib.AbstractContextManager[Any]: ...


@dataclass
class Skeleton:
    """A model without weights, what its Linears are to become, and where its parts go.

    packed  how a checkpoint that is quantized already holds its weights; None where it is not
    """

    model: Any
    schemes: dict[str, Scheme]
    packed: PackedFormat | CompressedFormat | None = None

    @property
    def bytes_needed(self) -> int:
        """Roughly what the quantized weights take."""
        return int(sum(p.numel() * self._bits(name, p) / 8 for name, p in self.model.named_parameters()))

    def _bits(self, name: str, parameter: torch.Tensor) -> float:
        module = name.rpartition(".")[0]
        if self.packed is not None and self.packed.holds(module):
            return self.packed.bits + 1
        scheme = self.schemes.get(module)
        return 8 * parameter.dtype.itemsize if scheme is None else scheme.bits_with_scales

    def places(self, device_map: str | Mapping[str, Any] | None) -> dict[str, torch.device]:
        """{module name, "" for all: device}.

        Raises BadInput for places on disk: quantized weights stay where they compute.
        """
        if device_map is None or (isinstance(device_map, str) and device_map not in (*_SPREAD, "disk")):
            return {"": torch.device(device_map or "cpu")}
        if device_map == "disk":
            found: Mapping[str, Any] = {"": "disk"}
        else:
            found = device_map if isinstance(device_map, Mapping) else self._spread(device_map)
        if "disk" in found.values():
            raise BadInput(
                "Cannot keep layers of a quantized model on disk: its weights stay on the device that computes with "
                f"them, and need {self.bytes_needed / 2**30:.1f} GiB. Use fewer bits, or more devices.",
                argument="device_map",
                value="disk",
            )
        return {
            name: torch.device(f"cuda:{place}" if isinstance(place, int) else place) for name, place in found.items()
        }

    def _spread(self, how: str) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            name: CustomDtype.INT4 if bits < 6 else torch.int8 if bits < 12 else p.dtype
            for name, p in self.model.named_parameters()
            for bits in (self._bits(name, p),)
        }
        options: dict[str, Any] = {
            "no_split_module_classes": list(self.model._no_split_modules),
            "special_dtypes": sizes,
        }
        memory = None
        if how != "sequential":
            memory = get_balanced_memory(self.model, low_zero=how == "balanced_low_0", **options)
        return dict(infer_auto_device_map(self.model, max_memory=memory, **options))


_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def skeleton_of(
    config: Any,
    quantization: Quantization | None,
    dtype: torch.dtype,
    packed: PackedFormat | CompressedFormat | None = None,
) -> Skeleton:
    """The model with experts as Linears, on the meta device, and the schemes of its Linears."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.model.layers:
        layer.mlp.experts = UnfusedExperts(config, layer.mlp.experts)
    # Its buffers are computed when it is made, and stand in no checkpoint.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.set_experts_implementation("eager")
    schemes = {} if quantization is None else schemes_of(model, quantization)
    return Skeleton(model.eval(), schemes, packed)


def fill(skeleton: Skeleton, checkpoint: Source, places: Mapping[str, torch.device], *, verbose: bool) -> Any:
    """Read, quantize and place every weight; gives the model.

    Raises ModelError when weights are missing, or a scheme does not run where it is to.
    """
    model, schemes = skeleton.model, skeleton.schemes
    if "lm_head" in schemes and tied(model):
        raise BadInput(
            "Cannot quantize the head of this model: it shares its weights with the embeddings "
            "(tie_word_embeddings), which are looked up and not quantized. Leave the head out.",
            argument="quantization",
            value="head",
        )
    for scheme in set(schemes.values()):
        require(scheme, {_place(name, places) for name, own in schemes.items() if own == scheme})
    modules = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    _check_complete(skeleton, checkpoint, modules)
    shared = tied(model)
    groups: dict[str, list[str]] = {}
    for name in (name for name in modules if f"{name}.weight" not in shared):
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    for names in tqdm(groups.values(), desc="Loading and quantizing", unit="part", disable=not verbose, leave=False):
        with checkpoint.reading() as read:
            for name in names:
                _fill_module(skeleton, name, read, _place(name, places))
        _give_back_freed_memory()
    model.tie_weights()
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(module, own, buffer.to(_place(name, places)))
    _join(model, places)
    return model


def finish(model: Any, name: str, revision: str | None) -> Any:
    """What `from_pretrained` also leaves on a model."""
    model.name_or_path = model.config._name_or_path = name
    with contextlib.suppress(OSError):  # none was saved; that of the config stands
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return model


def _give_back_freed_memory() -> None:
    """Packed weights lie between what quantizing them freed, which glibc would keep: more than bfloat16 needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _fill_module(skeleton: Skeleton, name: str, read: Any, device: torch.device) -> None:
    model, module = skeleton.model, skeleton.model.get_submodule(name)
    packed, scheme = skeleton.packed, skeleton.schemes.get(name)
    if packed is not None and packed.holds(name):
        made = packed.read(name, read).to(device)
        _check_shape(name, (made.out_features, made.in_features), module.weight)
    elif scheme is not None:
        weight = read(f"{name}.weight")
        _check_shape(name, weight.shape, module.weight)
        bias = None if getattr(module, "bias", None) is None else read(f"{name}.bias")
        made = quantize_linear(weight, scheme, device, module.weight.dtype, bias)
    else:
        for own, parameter in list(module.named_parameters(recurse=False)):
            value = read(f"{name}.{own}").to(device=device, dtype=parameter.dtype, copy=True)
            _check_shape(name, value.shape, parameter)
            setattr(module, own, nn.Parameter(value, requires_grad=False))
        return
    if name.endswith(".gate"):
        made = QuantizedRouter(made, module.top_k)
    model.set_submodule(name, made)


def _check_shape(name: str, found: Sequence[int], wanted: torch.Tensor) -> None:
    if tuple(found) != tuple(wanted.shape):
        raise ModelError(
            f"Cannot load {name}: its weight has the shape {list(found)} in the checkpoint and {list(wanted.shape)} "
            "by config.json. Pass a config and a checkpoint of the same model.",
            argument=name,
            value=(list(found), list(wanted.shape)),
        )


def _check_complete(skeleton: Skeleton, checkpoint: Source, modules: list[str]) -> None:
    packed = skeleton.packed
    wanted = [
        f"{name}.{own}"
        for name in modules
        for own in (
            packed.parts(name)
            if packed is not None and packed.holds(name)
            else dict(skeleton.model.get_submodule(name).named_parameters(recurse=False))
        )
    ]
    if missing := sorted(set(wanted) - set(checkpoint.tensors) - tied(skeleton.model)):
        raise ModelError(
            f"Cannot load {checkpoint.folder}: its checkpoint lacks {len(missing)} weights ({', '.join(missing[:3])} "
            "...). Complete the checkpoint, or download it again.",
            argument="weights",
            value=sorted(missing),
        )


def tied(model: Any) -> set[str]:
    """Names of weights that are another's, which tie_weights gives them."""
    return set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()


def _place(name: str, places: Mapping[str, torch.device]) -> torch.device:
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        if (prefix := ".".join(parts[:end])) in places:
            return places[prefix]
    raise BadInput(
        f"Cannot place the model: device_map has no entry for {name}. Add one for it, or for a module that contains "
        'it, or pass device_map="auto".',
        argument="device_map",
        value=name,
    )


def _join(model: Any, places: Mapping[str, torch.device]) -> None:
    """Move hidden states from device to device where the parts of a model are on several."""
    if len(set(places.values())) == 1:
        return
    skip = model._skip_keys_device_placement
    names = {module: name for name, module in model.named_modules()}
    first = _place(names[model.get_input_embeddings()], places)
    add_hook_to_module(model, AlignDevicesHook(first, io_same_device=True, skip_keys=skip))
    for name, device in places.items():
        module = model.get_submodule(name)
        if module is not model:
            add_hook_to_module(module, AlignDevicesHook(device, skip_keys=skip), append=True)
    model.hf_device_map = dict(places)


def _renamed(key: str) -> str:
    for old, new in _RENAMED.items():
        if old == ".block_sparse_moe." or ".experts." in key:
            key = key.replace(old, new)
    return key


def _file(name: str, file: str, revision: str | None, *, required: bool) -> str | None:
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=required)
    return None if found is None else str(found)
