"""What a recording would read, compute and write, told from documents, tokenizer and config before any weights are."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import numpy as np
from torch import nn

from mixlens.errors import BadInput
from mixlens.models.demo import DEMO, demo_path
from mixlens.models.layout import config_of, moe_layers, n_experts, top_k
from mixlens.recording.corpus import Corpus, RecordSettings, lengths_of
from mixlens.recording.reader import batches
from mixlens.trace import shards
from mixlens.trace.signals import TOP, Signals, Site, parse_signals
from mixlens.trace.trace import Trace

_TOKEN_BYTES = 17  # sequence, position, token_id, phase, logprob


def estimate(
    skeleton: nn.Module,
    documents: Iterable[Any],
    *,
    signals: Iterable[str | Site],
    settings: RecordSettings,
    like: Trace | None = None,
) -> dict[str, Any]:
    """Return documents, sequences, tokens, batches, bytes on disk (at most) and of weights, and seconds of a recording.

    skeleton  the model, whose weights may be on the device meta; settings then name the tokens of a batch
    like      an earlier recording of the model on this machine, whose rate is taken; None for no seconds

    Raises BadInput for documents that cannot be recorded, and for an earlier recording of another model.
    """
    corpus = Corpus.of(skeleton, documents, None, settings)
    lengths = [lengths_of(shard) for shard in corpus.shards()]
    tokens = int(sum(part.sum() for part in lengths))
    asked = parse_signals(signals, [layer.index for layer in moe_layers(skeleton)])
    return {
        "documents": corpus.documents.count,
        "sequences": sum(map(len, lengths)),
        "tokens": tokens,
        "longest_tokens": int(max(part.max() for part in lengths)),
        "truncated_tokens": corpus.tally.truncated_tokens,
        "batches": sum(1 for part in lengths for _ in batches(part, corpus.batch_tokens)),
        "disk_bytes": tokens * bytes_of_token(skeleton, asked),
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in skeleton.parameters()),
        "seconds": None if like is None else tokens / _tokens_per_s(like, skeleton),
    }


def bytes_of_token(model: nn.Module, signals: Signals) -> int:
    """Bytes of everything that is kept of a token, before Parquet packs its columns."""
    config, experts, layers = config_of(model), n_experts(model), len(moe_layers(model))
    chosen = max(top_k(model).values())
    half = np.dtype(np.float16).itemsize
    routing = chosen * np.dtype(shards.id_dtype(experts)).itemsize + (chosen - 1) * half
    routing += experts * half if signals.router_logits else 0
    top = TOP * 8 + 4 if signals.top_logprobs else 0
    widths = {
        "expert_out": chosen * config.hidden_size,
        "expert_norm": chosen,
        "expert_neurons": chosen * getattr(config, "intermediate_size", 0),
    }
    sites = sum(
        widths.get(site.name, config.hidden_size) * len(site.layers or ()) * np.dtype(site.dtype).itemsize
        for site in signals.sites
    )
    return _TOKEN_BYTES + layers * routing + top + sites


def _tokens_per_s(run: Trace, skeleton: Any) -> float:
    name = DEMO if skeleton.name_or_path == str(demo_path()) else skeleton.name_or_path
    began = run.meta.get("reading", {}).get("started")
    seconds = 0.0 if began is None else _seconds(began, run.meta["created"])
    model = run.meta.get("model", {}).get("name")
    if model != name or seconds < 1:
        raise BadInput(
            f"Cannot tell the time from this recording: it is of {model}, and took {seconds:.0f} s. Pass one of the "
            "same model on this machine that took a second or longer.",
            argument="like",
            value=model,
        )
    return run.n_tokens / seconds


def _seconds(began: str, ended: str) -> float:
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
