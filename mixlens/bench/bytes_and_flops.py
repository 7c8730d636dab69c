"""Bytes read and operations done by each forward pass of a call, from its recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixlens.bench.roofline import Sizes, Weights
from mixlens.models.layout import moe_layers
from mixlens.models.provenance import audit
from mixlens.recording.compiled import CompiledRecorder
from mixlens.trace.shards import PROMPT

Step = dict[str, Any]


class Work:
    """Counts the bytes and operations of a model's forward passes, from the actual sizes of its tensors."""

    def __init__(self, model: Any) -> None:
        self.sizes = Sizes.of(model.config.to_dict())
        self.cached_bytes = self.sizes.cached * model.dtype.itemsize
        self.weights = weights_of(model, self.cached_bytes)

    def of_call(
        self, recorder: CompiledRecorder | None, lengths: Sequence[int], forwards: int, *, complete: bool
    ) -> list[Step]:
        """Return experts, read_bytes and flops of each forward pass of the last call of generate.

        lengths   number of prompt tokens of each row
        forwards  number of forward passes
        complete  whether generate ran to its end, so that the recorder has every forward pass
        """
        flops = [self.sizes.flops(lengths)] * min(forwards, 1)
        for step in range(1, forwards):
            flops.append(sum(self.sizes.flops([1], length + step - 1) for length in lengths))
        unknown: list[Step] = [{"experts": None, "read_bytes": None, "flops": n} for n in flops]
        if recorder is None or not complete:
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
            read, experts = self.weights.read(part, [length + number for length in lengths])
            found.append({"experts": experts, "read_bytes": read, "flops": n})
        return found


def weights_of(model: Any, cached_bytes: int) -> Weights:
    """Return the bytes of a model's weights as counted by the audit, which uses the shapes of offloaded weights.

    Assumes that all experts of a layer have the same size.
    """
    sizes = Sizes.of(model.config.to_dict())
    held = audit(model).table.groupby("kind")["bytes"].sum().to_dict()
    # A tied embedding table is also the head, and so every forward pass reads it.
    left_out = {"experts"} if not sizes.embedding else {"experts", "embeddings"}
    dense = sum(size for kind, size in held.items() if kind not in left_out)
    experts = np.array([audit(layer.experts).table["bytes"].sum() for layer in moe_layers(model)])
    return Weights(int(dense), np.repeat(experts[:, None] // sizes.experts, sizes.experts, axis=1), cached_bytes)
