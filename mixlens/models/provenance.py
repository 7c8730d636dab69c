"""audit: what the weights of a model really take, counted from their storage."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mixlens.errors import BadInput, visible
from mixlens.models.demo import DEMO, demo_path
from mixlens.models.layout import KINDS, config_of, is_sharded, kind_of, moe_layers, refuse_pipeline
from mixlens.models.quantization.linears import SCHEMES, scheme_of
from mixlens.models.quantization.unfuse import is_unfused

_BF16 = 2  # bytes
_ROW = 1024  # words of a checksum's row
_ROWS = 64  # of a block on a CPU, whose second reading finds it in the cache
_SLACK = 1.1  # what packing of 3 bits into 32 may waste
# What a module keeps beside its own weights: other modules, hooks, and the scratch of bitsandbytes' last forward.
_NOT_WEIGHTS = frozenset({"_modules", "_hf_hook", "module", "grad", "idx", "subB", "CBt", "SBt", "_old_forward"})

_STATE = ("training", "gradient_checkpointing")  # switches of modules that decide no number of a forward
_LIBRARIES = ("mixlens", "torch", "transformers", "accelerate", "peft", "torchao", "bitsandbytes", "hqq", "functools")

# In a config, what transformers writes on saving, and what is about the run rather than the model.
_VOLATILE = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "output_router_logits",
)


@dataclass(frozen=True, repr=False)
class Audit:
    """True storage of a model's weights, by kind and scheme.

    table    one row a kind (attention, router, experts, embeddings, head, norms) and scheme: weights; share, of all
             weights; bytes, with scales, zeros and other state; bits_per_weight; of_bf16, against two bytes a weight
    label    "nf4" where attention and experts are held so, wholly and in as few bits as that says; else what they are
    remarks  what a reader would not expect
    """

    table: pd.DataFrame
    label: str
    remarks: tuple[str, ...]

    @property
    def weights(self) -> int:
        return int(self.table["weights"].sum())

    @property
    def bytes(self) -> int:
        return int(self.table["bytes"].sum())

    @property
    def of_bf16(self) -> float:
        """Bytes of the whole model against those of its original in bfloat16."""
        return self.bytes / (_BF16 * self.weights)

    def of(self, kind: str) -> dict[str, float]:
        """weights, bytes, bits_per_weight and of_bf16 of one kind, over its schemes.

        Raises BadInput for a kind that the model lacks.
        """
        rows = self.table[self.table["kind"] == kind]
        if rows.empty:
            raise BadInput(
                f"Cannot find {kind!r} in the audit: the model has {', '.join(self.table['kind'].unique())}. Pass one "
                "of these.",
                argument="kind",
                value=kind,
            )
        weights, held = int(rows["weights"].sum()), int(rows["bytes"].sum())
        ratio = held / (_BF16 * weights)
        return {"weights": weights, "bytes": held, "bits_per_weight": 16 * ratio, "of_bf16": ratio}

    def summary(self) -> dict[str, Any]:
        """The same as plain JSON values, for provenance."""
        return {
            "label": self.label,
            "weights": self.weights,
            "bytes": self.bytes,
            "of_bf16": round(self.of_bf16, 4),
            "remarks": list(self.remarks),
            "rows": [
                {
                    "kind": row["kind"],
                    "scheme": row["scheme"],
                    "weights": int(row["weights"]),
                    "bytes": int(row["bytes"]),
                    "bits_per_weight": round(float(row["bits_per_weight"]), 3),
                }
                for row in self.table.to_dict("records")
            ],
        }

    def __repr__(self) -> str:
        return visible("\n".join([self._headline(), "", self._shown().to_string(index=False), *self.remarks]))

    def _repr_html_(self) -> str:
        remarks = "".join(f"<p>{_escaped(text)}</p>" for text in self.remarks)
        table = self._shown().to_html(index=False, border=0, justify="left")
        return f"<p>{_escaped(self._headline())}</p>{table}{remarks}"

    def _headline(self) -> str:
        return (
            f"{self.label}: {self.weights:,} weights in {self.bytes:,} bytes, {self.of_bf16:.3f} of bfloat16's "
            f"{_BF16 * self.weights:,}"
        )

    def _shown(self) -> pd.DataFrame:
        total = {"kind": "all", "scheme": "", "weights": self.weights, "share": 1.0, "bytes": self.bytes}
        total |= {"bits_per_weight": 16 * self.of_bf16, "of_bf16": self.of_bf16}
        frame = pd.DataFrame([*self.table.to_dict("records"), total])
        return pd.DataFrame(
            {
                "kind": frame["kind"],
                "scheme": frame["scheme"],
                "weights": frame["weights"].map("{:,}".format),
                "share": frame["share"].map("{:.1%}".format),
                "bytes": frame["bytes"].map("{:,}".format),
                "bits a weight": frame["bits_per_weight"].map("{:.2f}".format),
                "of bf16": frame["of_bf16"].map("{:.3f}".format),
            }
        )


def audit(model: nn.Module) -> Audit:
    """Count the bytes that each kind of weight takes, however the model was loaded and quantized.

    Bytes are those of every tensor that a module keeps for its weights: packed numbers, scales, zeros, code books,
    and what tensor subclasses hold inside; each storage once. Weights that are offloaded count with the size of what
    stands for them.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.

    Returns
    -------
    xarray.Dataset
        Audit.

    Raises
    ------
    BadInput
        For something that has no weights.
    ModelError
        For a model whose layers are shared out over processes.

    Examples
    --------
    >>> ml.audit(model).label
    'float32'
    """
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"Cannot count the weights of a {type(model).__name__}: it is not a model. Pass a loaded one, such as "
            "ml.load(...).",
            argument="model",
            value=type(model).__name__,
        )
    refuse_pipeline(model)
    held: dict[tuple[str, str], _Held] = {}
    seen: set[Any] = set()
    offloaded = 0
    for name, module in model.named_modules():
        if not (weights := _logical_weights(module)):
            continue
        if not (tensors := list(_tensors(vars(module), seen))):  # tied to one that was counted
            continue
        sizes = [t.numel() * t.element_size() for t in tensors]
        offloaded += sum(size for t, size in zip(tensors, sizes, strict=True) if t.is_meta)
        own = held.setdefault((kind_of(name), _scheme(module, weights, max(sizes, default=0))), _Held())
        own.weights += weights
        own.bytes += sum(sizes)
    if not held:
        raise BadInput(
            f"Cannot audit a {type(model).__name__}: it has no weights. Pass a loaded model, such as ml.load(...).",
            argument="model",
            value=type(model).__name__,
        )
    total = sum(own.weights for own in held.values())
    order = {kind: place for place, kind in enumerate(KINDS)}
    rows = [
        {
            "kind": kind,
            "scheme": scheme,
            "weights": own.weights,
            "share": own.weights / total,
            "bytes": own.bytes,
            "bits_per_weight": 8 * own.bytes / own.weights,
            "of_bf16": own.bytes / (_BF16 * own.weights),
        }
        for (kind, scheme), own in sorted(held.items(), key=lambda item: (order.get(item[0][0], 99), -item[1].weights))
    ]
    table = pd.DataFrame(rows)
    return Audit(table, _label(table), tuple(_remarks(model, table, offloaded)))


@dataclass
class _Held:
    weights: int = 0
    bytes: int = 0


def _logical_weights(module: Any) -> int:
    """Weights that a module has itself, however it holds them."""
    parameters = [p for p in vars(module).get("_parameters", {}).values() if p is not None]
    if type(module).__name__ == "HQQLinear":
        return math.prod(module.meta["shape"])
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        bias = getattr(module, "bias", None)
        return module.in_features * module.out_features + (bias.numel() if isinstance(bias, torch.Tensor) else 0)
    return sum(math.prod(getattr(getattr(p, "quant_state", None), "shape", p.shape)) for p in parameters)


def _tensors(value: Any, seen: set[Any]) -> Iterator[torch.Tensor]:
    """Every plain tensor inside a value, once; never those of other modules."""
    if isinstance(value, nn.Module):
        return
    if isinstance(value, DTensor):  # counts as the whole, of which this process holds a part
        if id(value) not in seen:
            seen.add(id(value))
            yield value
        return
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                yield from _tensors(getattr(value, name), seen)
            return
        place = (value.data_ptr(), str(value.device), value.numel()) if value.data_ptr() else (id(value),)
        if place not in seen:
            seen.add(place)
            yield value
        yield from _tensors(vars(value), seen)
    elif isinstance(value, Mapping):
        for name, inner in list(value.items()):
            if name not in _NOT_WEIGHTS and not str(name).endswith("_hooks"):
                yield from _tensors(inner, seen)
    elif type(value).__name__ in ("QuantState", "MatmulLtState"):
        yield from _tensors(vars(value), seen)


def _scheme(module: Any, weights: int, largest: int) -> str:
    """The scheme of a module; with its bits where the numbers take more than it says."""
    own = {name: p for name, p in vars(module).get("_parameters", {}).items() if p is not None}
    parameters = [p for name, p in own.items() if name != "bias"] or list(own.values())
    names = {scheme_of(module, p) for p in parameters} or {scheme_of(module)}
    name = "+".join(sorted(names))
    nominal = _nominal_bits(name)
    bits = 8 * largest / weights
    return name if nominal is None or bits <= _SLACK * nominal else f"{name} in {bits:.0f} bits"


def _nominal_bits(scheme: str) -> int | None:
    if scheme in SCHEMES:
        return SCHEMES[scheme].bits
    method = scheme.rstrip("0123456789")
    return int(scheme.removeprefix(method)) if method in ("gptq", "awq", "hqq") else 4 if scheme == "fp4" else None


def _label(table: pd.DataFrame) -> str:
    experts, attention = (_held_as(table[table["kind"] == kind]) for kind in ("experts", "attention"))
    if experts == attention or not experts or not attention:
        return experts or attention or _held_as(table)
    return f"experts {experts}, attention {attention}"


def _held_as(rows: pd.DataFrame) -> str:
    share = rows.groupby("scheme")["weights"].sum().sort_values(ascending=False)
    if len(share) <= 1:
        return "".join(map(str, share.index))
    return " and ".join(f"{scheme} ({part:.1%})" for scheme, part in (share / share.sum()).items())


def _remarks(model: Any, table: pd.DataFrame, offloaded: int) -> Iterator[str]:
    plain = table["scheme"].isin(("bfloat16", "float16", "float32"))
    experts = table["kind"] == "experts"
    claimed = getattr(getattr(model, "config", None), "quantization_config", None)
    fused = not any(is_unfused(module) for module in model.modules())
    if experts.any() and plain[experts].all() and fused and (claimed or not plain[table["kind"] == "attention"].all()):
        share = table.loc[experts, "share"].sum()
        dtype = ", ".join(table.loc[experts, "scheme"])
        yield (
            f"The experts, {share:.1%} of all weights, are in {dtype}: this model was quantized by something that "
            "reaches Linears only, and transformers holds experts as fused tensors. mixlens.load(..., "
            'quantization="nf4") reaches them.'
        )
    if offloaded:
        yield f"{offloaded:,} bytes are offloaded, and counted by their shape."


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def describe(model: nn.Module, audited: Audit | None = None) -> dict[str, Any]:
    """Provenance of a loaded model, as plain JSON values: with its audit, and parameters as it counts them.

    audited  its audit, where there is one already
    """
    config, counted = config_of(model), (audited or audit(model)).summary()
    kept = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    name = str(getattr(model, "name_or_path", "") or config._name_or_path or type(model).__name__)
    devices = sorted({str(p.device) for p in model.parameters()})
    return {
        "name": DEMO if name == str(demo_path()) else name,
        "revision": getattr(config, "_commit_hash", None),
        "config_sha256": digest,
        "router_sha256": _router_fingerprint(model),
        "class": type(model).__name__,
        "parameters": counted["weights"],
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "experts_implementation": getattr(config, "_experts_implementation", None),
        "attention_implementation": getattr(config, "_attn_implementation", None),
        "devices": devices,
        "audit": counted,
    }


def identity(model: Any, described: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides the numbers that a model gives: a run resumes on other devices, and under the same weights only."""
    described = describe(model) if described is None else described
    kept = {key: value for key, value in described.items() if key not in ("devices", "class")}
    return {
        **kept,
        "weights_checksum": weights_checksum(model),
        "adapters": _adapters(model),
        "modules_sha256": None if is_sharded(model) else _modules_sha256(model),
        "hooks": _hooks(model),
    }


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """A checksum of every bit of every weight, in order, computed where each tensor lies.

    The 64-bit words of a tensor are laid out in rows; the sums of all rows and of all columns, each times its own odd
    number, are added modulo 2**64. Two words that change places change both sums. This tells models apart at the
    speed of memory, and is no guard against forgery. Weights that are offloaded are read where they are kept.
    """
    digest = hashlib.sha256()
    seen: set[Any] = set()
    for name, module in model.named_modules():
        if not _logical_weights(module):
            continue
        for number, tensor in enumerate(_present(module, seen)):
            digest.update(f"{name} {number} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}".encode())
    return digest.hexdigest()


def _present(module: Any, seen: set[Any]) -> Iterator[torch.Tensor]:
    """The tensors of a module, fetched from where accelerate has put them."""
    kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    for tensor in _tensors(vars(module), seen):
        if not tensor.is_meta:
            yield tensor
    if kept is not None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                yield kept[name]


def _checksum(tensor: torch.Tensor) -> str:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // (8 * _ROW) * (8 * _ROW)
    body = data[:whole] if data.data_ptr() % 8 == 0 else data[:whole].clone()
    words = body.view(torch.int64).view(-1, _ROW)
    columns, rows = words.new_zeros(_ROW), [words.new_zeros(0)]
    for block in words.split(_ROWS if words.device.type == "cpu" else max(len(words), 1)):
        columns += block.sum(0)
        rows.append(block.sum(1))
    total = words.new_zeros(())
    for sums in (columns, torch.cat(rows)):
        total += (sums * (2 * torch.arange(len(sums), device=words.device) + 1)).sum()
    return f"{int(total)} {hashlib.sha256(data[whole:].cpu().numpy().tobytes()).hexdigest()}"


def _modules_sha256(model: nn.Module) -> str:
    """Of what decides a forward beside its weights: the kinds of modules, their numbers and switches, and buffers.

    Buffers count to four digits, in which devices agree on what a model computes when it is made.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        kind = type(module)
        own = {} if not kind.__module__.startswith("transformers.models.") else vars(module)
        numbers = {key: value for key, value in own.items() if isinstance(value, int | float) and key not in _STATE}
        buffers = {} if _logical_weights(module) else dict(module.named_buffers(recurse=False))
        digest.update(json.dumps([name, kind.__name__, numbers, sorted(buffers)], sort_keys=True).encode())
        for key in sorted(buffers):
            mantissa, exponent = np.frexp(buffers[key].double().cpu().numpy())
            digest.update(np.round(mantissa * 1e4).astype(np.int64).tobytes() + exponent.tobytes())
    return digest.hexdigest()


def _hooks(model: nn.Module) -> list[str]:
    """Names of the hooks and forwards that the caller has put on modules."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if not hasattr(module, "_hf_hook"):  # accelerate's
            hooks += [vars(module)["forward"]] if "forward" in vars(module) else []
        for hook in hooks:
            hook = getattr(hook, "func", hook)
            place = str(getattr(hook, "__module__", None) or type(hook).__module__)
            if place.split(".")[0] not in _LIBRARIES:
                found.append(f"{name}: {place}.{getattr(hook, '__qualname__', type(hook).__qualname__)}")
    return found


def _adapters(model: nn.Module) -> list[str]:
    """The adapters that PEFT applies to the modules of a model: weights tell which there are, not which are active."""
    found = {
        f"{list(cast(Any, module).active_adapters)} merged {sorted(getattr(module, 'merged_adapters', ()))} "
        f"scaled {dict(sorted(getattr(module, 'scaling', {}).items()))}"
        for module in model.modules()
        if hasattr(module, "active_adapters") and not getattr(module, "disable_adapters", False)
    }
    return sorted(found)


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """Of everything that decides its ids and its texts, as far as the tokenizer shows it."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    inner = getattr(tokenizer, "backend_tokenizer", None)
    shown = [
        sorted(tokenizer.get_vocab().items()),
        getattr(tokenizer, "special_tokens_map", None),
        getattr(tokenizer, "chat_template", None),
        None if inner is None else inner.to_str(),
    ]
    return hashlib.sha256(json.dumps(shown, default=str).encode()).hexdigest()


def _router_fingerprint(model: nn.Module) -> str | None:
    """Hash of all router weights: tells checkpoints of one architecture apart. None where this process has not all."""
    digest = hashlib.sha256()
    for layer in moe_layers(model):
        weight = layer.router_weight
        if weight.device.type == "meta" or isinstance(weight, DTensor):
            return None
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
