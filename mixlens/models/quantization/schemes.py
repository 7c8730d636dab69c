"""Which Linear of a model is held in which scheme."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mixlens.errors import BadInput
from mixlens.models.layout import KINDS, kind_of
from mixlens.models.quantization.linears import SCHEMES, Scheme

Quantization = str | Mapping[str, str]
# What is quantized only when it is named.
_SPARED = ("router", "head")
_PLAIN = "none"


def schemes_of(model: nn.Module, quantization: Quantization) -> dict[str, Scheme]:
    """{name of a Linear or router: its scheme}, of a model whose experts are Linears.

    quantization  a scheme for attention, experts, shared experts and dense layers ("nf4", "hqq2-g16"), or a mapping
                  from what is meant to a scheme, where later entries win. What is meant: "attention", "experts",
                  "shared", "dense", "router", "head", or a pattern on module names such as "*.layers.0.*" or
                  "*.experts.3.w2". "none" leaves weights as they are.

    Routers, the gates of shared experts and the head are quantized only where "router" or "head" names them, or a
    pattern ends in gate or lm_head. Mamba layers keep their weights, which their kernels read themselves.

    Raises BadInput for an unknown scheme, a pattern that meets nothing, and a group size that does not divide.
    """
    names = [name for name, module in model.named_modules() if _quantizable(name, module)]
    if isinstance(quantization, Mapping):
        asked = quantization
    else:
        there = {kind_of(name) for name in names}
        asked = {kind: quantization for kind in KINDS if kind not in _SPARED and kind in there}
    if not asked:
        raise BadInput(
            'Cannot quantize by an empty mapping. Pass a scheme such as "nf4", or None for no quantization.',
            argument="quantization",
            value={},
        )
    found: dict[str, Scheme] = {}
    for pattern, text in asked.items():
        scheme = parse_scheme(text)
        met = [name for name in names if _meant(pattern, name)]
        if not met:
            raise BadInput(
                f"Cannot quantize {pattern!r} to {text}: it matches no Linear of the model. Pass attention, experts, "
                'router or head, or a pattern such as "*.layers.0.*" or "*.experts.3.w2".',
                argument="quantization",
                value=pattern,
            )
        for name in met:
            found.pop(name, None)
            if scheme is not None:
                found[name] = scheme
    for name, scheme in found.items():
        _check_groups(name, model.get_submodule(name), scheme)
    return found


def parse_scheme(text: Any) -> Scheme | None:
    """A scheme from its name, with a group size of one's own as in "hqq4-g32"; None from "none".

    Raises BadInput for names that are none.
    """
    name, grouped, size = text.partition("-g") if isinstance(text, str) else (str(text), "", "")
    if text == _PLAIN:
        return None
    if name not in SCHEMES or (grouped and not re.fullmatch(r"[1-9][0-9]*", size)):
        near = difflib.get_close_matches(name, SCHEMES, n=1, cutoff=0.5)
        meant = f"; did you mean {near[0]}" if near else ""
        raise BadInput(
            f"Cannot quantize to {text!r}: no such scheme{meant}. Pass one of {', '.join(SCHEMES)}, with -g and a "
            "group size where needed (hqq4-g32), or none.",
            argument="quantization",
            value=text,
        )
    scheme = SCHEMES[name]
    if not grouped:
        return scheme
    if scheme.group_size is None:
        raise BadInput(
            f"Cannot quantize to {text}: {name} has one scale per row, and no groups. Pass {name}.",
            argument="quantization",
            value=text,
        )
    if int(size) % 8 or (name == "nf4" and int(size) not in (32, 64, 128, 256, 512, 1024, 2048, 4096)):
        allowed = "a power of two from 32 to 4096" if name == "nf4" else "a multiple of 8"
        raise BadInput(
            f"Cannot quantize to {text}: groups of {name} have {allowed} weights. Pass such a size, as in "
            f"{name}-g{scheme.group_size}.",
            argument="quantization",
            value=text,
        )
    return replace(scheme, group_size=int(size))


def _quantizable(name: str, module: nn.Module) -> bool:
    if kind_of(name) == "router":
        return hasattr(module, "weight")
    return isinstance(module, nn.Linear) and not {"mamba", "shared_expert_gate"} & set(name.split("."))


def _meant(pattern: str, name: str) -> bool:
    kind = kind_of(name)
    if pattern in KINDS:
        return kind == pattern
    spared = kind in _SPARED and not pattern.endswith(("gate", "lm_head"))
    return not spared and fnmatchcase(name, pattern)


def _check_groups(name: str, module: Any, scheme: Scheme) -> None:
    inputs = module.weight.shape[1]
    if scheme.name == "nf4" or scheme.group_size is None or inputs % scheme.group_size == 0:
        return  # blocks of bitsandbytes run over rows, and the last one may be short
    fitting = [size for size in (128, 64, 32, 16, 8) if inputs % size == 0 and size < scheme.group_size]
    raise BadInput(
        f"Cannot quantize {name} to {scheme.name} in groups of {scheme.group_size}: its rows have {inputs} weights, "
        "which the group size does not divide. "
        + (f"Pass {scheme.name}-g{fitting[0]}." if fitting else "Pass nf4 or int8, which need no groups."),
        argument=name,
        value=scheme.group_size,
    )
