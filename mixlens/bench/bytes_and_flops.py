"""Bytes read and operations done by each forward pass of a call, from its recorded routing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
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
from mixlens.models.provenance import audit
from mixlens.recording.compiled import CompiledRecorder
from mixlens.trace.shards import PROMPT

Step = dict[str, Any]
_PROBED = 3  # tokens of the forward that shows what a cache keeps


class Work:
    """Counts the bytes and operations of a model's forward passes, from the actual sizes of its tensors."""

    def __init__(self, model: Any) -> None:
        self.sizes = sizes_of(model)
        self._value_bytes = model.dtype.itemsize
        self.weights = weights_of(model)

    def cached_bytes(self, tokens: int) -> int:
        """What the cache of one row takes after so many tokens."""
        return self.sizes.kept(tokens) * self._value_bytes

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
            read, experts = self.weights.read(part)
            read += sum(self.cached_bytes(length + number) for length in lengths)
            found.append({"experts": experts, "read_bytes": read, "flops": n})
        return found


def sizes_of(model: Any) -> Sizes:
    """Return the parameters of a loaded model by who reads them, and what its cache keeps, of any family.

    Parameters are those of its modules. What the cache keeps is seen in a forward of the same model without weights.

    Raises ModelError where experts are not called one by one.
    """
    layers = moe_layers(model)
    for layer in layers:
        refuse_without_experts(layer, "count the bytes that a forward reads", inside=True)
    whole, embedding = audit(model).weights, audit(model.get_input_embeddings()).weights
    experts = [audit(layer.experts).weights for layer in layers]
    tied = bool(config_of(model).tie_word_embeddings)
    contexts, state = _kept_by(model)
    count = n_experts(model)
    return Sizes(
        layers=len(layers),
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
    """What each layer that attends keeps of a token, and the values of all states, as a cache shows them."""
    with torch.device("meta"), torch.no_grad():
        bare = type(unwrapped(model))(copy.deepcopy(unwrapped(model).config)).eval()
        for layer in moe_layers(bare):
            layer.experts.forward = _as_it_is  # type: ignore[method-assign]  which experts would run takes numbers
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
    """Heads times the mean width of keys and values as they are attended to; latent attention expands what it keeps."""
    attention = next((m for m in layer.modules() if hasattr(m, "num_key_value_groups")), layer)
    heads = getattr(attention, "num_heads", None) or keys.shape[1] * getattr(attention, "num_key_value_groups", 1)
    widths = getattr(attention, "qk_head_dim", keys.shape[-1]), getattr(attention, "v_head_dim", values.shape[-1])
    return heads * sum(widths) // 2


def weights_of(model: Any) -> Weights:
    """Return the bytes of a model's weights as counted by the audit, which uses the shapes of offloaded weights.

    Assumes that all experts of a layer have the same size.
    """
    experts = np.array([audit(layer.experts).bytes for layer in moe_layers(model)])
    # A tied embedding table is also the head, and so every forward pass reads it.
    tied = bool(config_of(model).tie_word_embeddings)
    dense = audit(model).bytes - experts.sum() - (0 if tied else audit(model.get_input_embeddings()).bytes)
    count = n_experts(model)
    return Weights(int(dense), np.repeat(experts[:, None] // count, count, axis=1))
