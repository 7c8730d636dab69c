"""Rerun of a trace: its tokens read again by a local model, with the model's own routing and with the trace's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from mixlens.errors import BadInput
from mixlens.interventions.edits import edit, replay
from mixlens.interventions.hooks import about_choices
from mixlens.models.layout import moe_layers, n_experts
from mixlens.models.provenance import describe
from mixlens.recording.corpus import RecordSettings, batch_size, tokenizer_of, vocabulary_of
from mixlens.recording.hooks import refuse_left_out
from mixlens.recording.reader import Reader
from mixlens.trace.shards import MemoryPart, choices_of, pack_weights
from mixlens.trace.signals import parse_signals
from mixlens.trace.trace import Trace, from_parts


@dataclass(frozen=True)
class Rerun:
    """A sample of a trace, and traces of the same tokens read again by a model.

    theirs        the sample
    here          the model with its own routing
    with_ids      the model with the experts of the sample
    with_weights  the model with the experts and weights of the sample; None if the trace has no weights
    """

    theirs: Trace
    here: Trace
    with_ids: Trace
    with_weights: Trace | None


def rerun(trace: Trace, model: nn.Module, *, sample: int = 64, seed: int = 0) -> Rerun:
    """Read documents of a trace again with a transformers model.

    Parameters
    ----------
    trace : Trace
        Trace with token ids of whole sequences.
    model : torch.nn.Module
        The recorded model, or another of the same shape.
    sample : int, optional
        Maximum number of documents, drawn without replacement.
    seed : int, optional
        Seed of the draw.

    Raises
    ------
    BadInput
        If the trace does not have whole sequences, or the model has another shape.
    """
    theirs = _in_memory(trace, sample, seed)
    layers = [layer.index for layer in moe_layers(model)]
    for what, of_trace, of_model in (
        ("layers", theirs.layers.tolist(), layers),
        ("experts a layer", theirs.n_experts, n_experts(model)),
        ("experts a token", theirs.top_k, about_choices(model)["top_k"]),
    ):
        if of_trace != of_model:
            raise BadInput(
                f"Cannot compare the trace with this model: the trace has {what} {of_trace}, the model {of_model}. "
                "Pass the model that was recorded, or a copy of it.",
                argument=what,
                value=(of_trace, of_model),
            )
    token_id, starts = theirs.read("token_id"), np.cumsum(theirs.sequences["length"].to_numpy())[:-1]
    sequences = np.split(token_id, starts)

    def read() -> Trace:
        signals = parse_signals(["router_logits", "logprob"], layers)
        with Reader(model, signals, batch_size(model, RecordSettings())) as reader:
            part = reader.read(sequences)
        refuse_left_out("read the tokens of this trace again", part.left_out)
        count = n_experts(model)
        chosen = choices_of(part.arrays["expert_id"], count)
        meta = {"source": "rerun", "model": describe(model), "n_experts": count, **chosen}
        made = from_parts([part], theirs.sequences.copy(), meta, layers)
        made._vocabulary = vocabulary
        return made

    vocabulary = _vocabulary_of(model)
    here = read()
    with edit(model, replay(theirs)):
        with_ids = read()
    if "weight" not in theirs.signals:
        return Rerun(theirs, here, with_ids, None)
    with edit(model, replay(theirs, weights=True)):
        return Rerun(theirs, here, with_ids, read())


def _in_memory(trace: Trace, sample: int, seed: int) -> Trace:
    """Load a sample of documents of a trace, with sequences numbered from 0."""
    trace.require("compare", "expert_id", "token_id", "position")
    if not isinstance(sample, int) or sample < 1:
        raise BadInput(
            f"Cannot compare a sample of {sample!r} documents: it is not a positive integer. Pass 1 or more.",
            argument="sample",
            value=sample,
        )
    documents = trace.sequences["document_id"].drop_duplicates()
    drawn = np.random.default_rng(seed).permutation(len(documents))[:sample]
    kept = trace.sequences["document_id"].isin(documents.iloc[np.sort(drawn)])
    chosen = trace.select(where=kept)
    columns = {name: chosen.read(name) for name in chosen.signals}
    _, sequence, length = np.unique(columns["sequence"], return_inverse=True, return_counts=True)
    begins = np.cumsum(length) - length
    if not np.array_equal(columns["position"], np.arange(len(sequence)) - begins[sequence]):
        raise BadInput(
            "Cannot read the tokens of this trace again: some of its sequences lack tokens, because it was selected by "
            "phase, token or position. Pass the whole trace.",
            argument="trace",
        )
    columns["sequence"] = sequence
    if "weight" in columns:
        columns["weight"] = pack_weights(columns["weight"])
    frame = chosen.sequences[chosen.sequences.index.isin(np.unique(chosen.read("sequence")))]
    made = from_parts(
        [MemoryPart(columns)], frame.reset_index(drop=True).assign(length=length), trace.meta, trace.layers
    )
    made._vocabulary = trace.vocabulary
    return made


def _vocabulary_of(model: nn.Module) -> pd.Series | None:
    try:
        return vocabulary_of(tokenizer_of(model))
    except BadInput:
        return None
