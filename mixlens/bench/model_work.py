"""What every forward of a call must read and compute, from the routing recorded in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mixlens.bench.roofline import Sizes, Weights
from mixlens.models.layout import kind_of, moe_layers
from mixlens.traces.compiled import CompiledRecorder
from mixlens.traces.store import PROMPT

Step = dict[str, Any]


class Work:
    """Counts bytes and operations of a model's forwards; the bytes are those that its tensors hold."""

    def __init__(self, model: Any) -> None:
        self.sizes = Sizes.of(model.config.to_dict())
        self.cached_bytes = self.sizes.cached * model.dtype.itemsize
        self._weights = weights_of(model, self.cached_bytes)

    def of_call(
        self, recorder: CompiledRecorder | None, lengths: Sequence[int], forwards: int, *, complete: bool
    ) -> list[Step]:
        """experts, read_bytes and flops of every forward of the generate that has just ended.

        lengths   tokens of each row's prompt
        forwards  how many there were
        complete  whether generate came to its end, so that the recorder knows all of them
        """
        flops = [self.sizes.flops(lengths)] * min(forwards, 1)
        for step in range(1, forwards):
            flops.append(sum(self.sizes.flops([1], length + step - 1) for length in lengths))
        unknown: list[Step] = [{"experts": None, "read_bytes": None, "flops": n} for n in flops]
        if recorder is None or not complete or self._weights is None:
            return unknown
        trace = recorder.trace()
        recorder.clear()
        expert_id, position = trace.read("expert_id"), trace.read("position")
        prompt = trace.read("phase") == PROMPT
        row = trace.read("sequence")
        step = np.where(prompt, 0, position - np.asarray(lengths)[row] + 1)
        order = np.argsort(step, kind="stable")
        parts = np.split(expert_id[order], np.flatnonzero(np.diff(step[order])) + 1)
        found: list[Step] = []
        for number, (part, n) in enumerate(zip(parts, flops, strict=True)):
            read, experts = self._weights.read(part, [length + number for length in lengths])
            found.append({"experts": experts, "read_bytes": read, "flops": n})
        return found


def weights_of(model: Any, cached_bytes: int) -> Weights | None:
    """Bytes of a model's weights as its tensors hold them; None where some are offloaded.

    The experts of a layer are taken to be equally large.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    layers = moe_layers(model)
    dense = sum(
        held_bytes(tensor)
        for name, module in model.named_modules()
        if kind_of(name) not in ("experts", "embeddings")
        for tensor in _own_tensors(module)
    )
    experts = [sum(held_bytes(t) for m in layer.experts.modules() for t in _own_tensors(m)) for layer in layers]
    n = Sizes.of(model.config.to_dict()).experts
    return Weights(dense, np.repeat(np.array(experts)[:, None] // n, n, axis=1), cached_bytes)


def held_bytes(tensor: Any) -> int:
    """Bytes that a tensor holds: of all that it is made of, where it is quantized."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [v for v in state.as_dict(packed=True).values() if isinstance(v, torch.Tensor)]
    return tensor.nbytes + sum(map(held_bytes, scales))


def _own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
