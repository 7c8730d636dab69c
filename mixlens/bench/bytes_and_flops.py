"""Bytes read and operations performed by each forward pass of a call, from its recorded routing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixlens.bench.roofline import Context, Sizes, Weights
from mixlens.models.layout import (
    CACHE,
    config_of,
    decoder_of,
    moe_layers,
    n_experts,
    refuse_without_experts,
    top_k,
    unwrapped,
)
from mixlens.models.provenance import Audit, audit
from mixlens.recording.compiled import CompiledRecorder
from mixlens.trace.shards import PROMPT

Step = dict[str, Any]
_PROBED = 3  # tokens of the forward pass that shows what a cache stores


@dataclass(frozen=True)
class Audits:
    """Audits of a model, its embedding table and the experts of each layer."""

    whole: Audit
    embedding: Audit
    experts: list[Audit]

    @classmethod
    def of(cls, model: Any) -> Audits:
        layers = moe_layers(model)
        for layer in layers:
            refuse_without_experts(layer, "count the bytes that a forward reads", inside=True)
        return cls(audit(model), audit(model.get_input_embeddings()), [audit(layer.experts) for layer in layers])


class Work:
    """Counts the bytes and operations of a model's forward passes from the actual sizes of its tensors."""

    def __init__(self, model: Any, audits: Audits | None = None) -> None:
        audits = audits or Audits.of(model)
        self.sizes = sizes_of(model, audits)
        self._value_bytes = model.dtype.itemsize
        self.weights = weights_of(model, audits)

    def cached_bytes(self, tokens: int) -> int:
        """Return the bytes that the cache of one row holds after `tokens` tokens."""
        return self.sizes.kept(tokens) * self._value_bytes

    def of_call(
        self, recorder: CompiledRecorder | None, lengths: Sequence[int], forwards: int, *, complete: bool
    ) -> list[Step]:
        """Return experts, read_bytes and flops of each forward pass of the last call of generate.

        lengths   number of prompt tokens of each row
        forwards  number of forward passes
        complete  whether generate ran to its end, so that the recorder holds every forward pass
        """
        flops = [self.sizes.flops(lengths)] * min(forwards, 1)
        for step in range(1, forwards):
            flops.append(sum(self.sizes.flops([1], length + step - 1) for length in lengths))
        unknown: list[Step] = [{"experts": None, "read_bytes": None, "flops": n} for n in flops]
        if recorder is None or not complete:
            return unknown
        recorded = recorder.columns()
        recorder.clear()
        expert_id, prompt = recorded["expert_id"], recorded["phase"] == PROMPT
        row = np.unique(recorded["sequence"], return_inverse=True)[1]
        step = np.where(prompt, 0, recorded["position"] - np.asarray(lengths)[row] + 1)
        order = np.argsort(step, kind="stable")
        parts = np.split(expert_id[order], np.flatnonzero(np.diff(step[order])) + 1)
        found: list[Step] = []
        for number, (part, n) in enumerate(zip(parts, flops, strict=True)):
            read, experts = self.weights.read(part)
            read += sum(self.cached_bytes(length + number) for length in lengths)
            found.append({"experts": experts, "read_bytes": read, "flops": n})
        return found


def sizes_of(model: Any, audits: Audits | None = None) -> Sizes:
    """Return the parameter counts of a loaded model by component, and the size of its cache, for any family.

    Parameters are those of the model's modules. The cache size comes from a forward pass of the same model without
    weights.

    Raises ModelError if the model does not call its experts individually.
    """
    audits = audits or Audits.of(model)
    whole, embedding = audits.whole.weights, audits.embedding.weights
    experts = [one.weights for one in audits.experts]
    tied = bool(config_of(model).tie_word_embeddings)
    contexts, state = _kept_by(model)
    count = n_experts(model)
    return Sizes(
        layers=len(experts),
        experts=count,
        top_k=max(top_k(model).values()),
        dense=whole - sum(experts) - (0 if tied else embedding),
        expert=experts[0] // count,
        head=embedding if tied else audit(model.get_output_embeddings()).weights,
        embedding=0 if tied else embedding,
        contexts=tuple(contexts),
        state=state,
    )


def _kept_by(model: Any) -> tuple[list[Context], int]:
    """Return the cached values per token of each attention layer, and the total number of state values."""
    with torch.device("meta"), torch.no_grad():
        bare = type(unwrapped(model))(copy.deepcopy(unwrapped(model).config)).eval()
        for layer in moe_layers(bare):
            layer.experts.forward = _as_it_is  # type: ignore[method-assign]  routing needs real numbers
        cache = getattr(bare(torch.ones(1, _PROBED, dtype=torch.long), use_cache=True), CACHE)
    contexts, state = [], sum(map(torch.Tensor.numel, _tensors_of(vars(cache))))
    for kept, layer in zip(cache.layers, decoder_of(bare).layers, strict=False):
        keys, values = (getattr(kept, name, None) for name in ("keys", "values"))
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.numel():
            cached = (keys.numel() + values.numel()) // _PROBED
            contexts.append(Context(cached, _query_values(layer, keys, values), getattr(kept, "sliding_window", None)))
        else:
            state += sum(map(torch.Tensor.numel, _tensors_of(vars(kept))))
    return contexts, state


def _as_it_is(hidden: torch.Tensor, *_args: Any, **_options: Any) -> torch.Tensor:
    return hidden


def _tensors_of(values: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in values.values():
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        yield from (one for one in inner if isinstance(one, torch.Tensor))


def _query_values(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Return heads times the mean width of expanded keys and values; latent attention caches fewer values."""
    attention = next((m for m in layer.modules() if hasattr(m, "num_key_value_groups")), layer)
    heads = getattr(attention, "num_heads", None) or keys.shape[1] * getattr(attention, "num_key_value_groups", 1)
    widths = getattr(attention, "qk_head_dim", keys.shape[-1]), getattr(attention, "v_head_dim", values.shape[-1])
    return heads * sum(widths) // 2


def weights_of(model: Any, audits: Audits | None = None) -> Weights:
    """Return the bytes of a model's weights, as counted by the audit, which uses the shapes of offloaded weights.

    Assumes that all experts of a layer have the same size.
    """
    audits = audits or Audits.of(model)
    experts = np.array([one.bytes for one in audits.experts])
    # A tied embedding table is also the head, so every forward pass reads it.
    tied = bool(config_of(model).tie_word_embeddings)
    dense = audits.whole.bytes - experts.sum() - (0 if tied else audits.embedding.bytes)
    count = n_experts(model)
    return Weights(int(dense), np.repeat(experts[:, None] // count, count, axis=1))
