"""Loss and routing when every token chooses k experts, for each k, with intervals over documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from mixlens.errors import BadInput
from mixlens.interventions.edits import edit
from mixlens.interventions.edits import top_k as choose
from mixlens.interventions.where import whole_numbers
from mixlens.models.layout import moe_layers, n_experts, top_k
from mixlens.recording.corpus import Corpus, RecordSettings, Shard, lengths_of, measure_documents, sum_documents
from mixlens.recording.hooks import refuse_left_out
from mixlens.recording.reader import Reader
from mixlens.stats import topk as stats
from mixlens.trace.signals import Signals, parse_signals

SETTINGS = RecordSettings(shard_tokens=16_384)


def topk_sweep(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    by: str | Sequence[str] | None = None,
    ks: int | Iterable[int] | None = None,
    out: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Compute the loss at every k, and its change against the model's own k on the same tokens.

    Applies stats.topk_sweep to the result of measure_topk; see these for arguments and errors.
    """
    measured = measure_topk(model, documents, ks=ks, out=out, tokenizer=tokenizer, settings=settings)
    return stats.topk_sweep(measured, by=by)


def measure_topk(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    ks: int | Iterable[int] | None = None,
    out: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Measure every document when each token chooses k experts.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    documents : Iterable[Any]
        Strings, mappings with a text column, or a datasets.Dataset.
    ks : int or Iterable[int], optional
        Numbers of experts per token; None for 1 to all. The model's own k is always measured.
    out : str or os.PathLike, optional
        Run directory; None keeps the result in memory. A stopped run resumes where it stopped. Under
        `accelerate launch` each process measures its share of the shards, and each returns the complete result.
    tokenizer : Any, optional
        Tokenizer; None for the model's own.
    settings : RecordSettings, optional
        Settings for reading the documents.

    Returns
    -------
    Dataset
        loss in nats, over the predicted tokens [document, k]; first_weight, weight of the strongest expert [document,
        k, layer]; chosen [document, k, layer, expert]; tokens (predicted), length [document].

    Raises
    ------
    BadInput
        If a k is out of range, or documents cannot be read with these settings.
    RunError
        As for record.

    Examples
    --------
    >>> measured = ml.experiments.measure_topk(model, documents[:2], ks=[1, 2], settings=quiet)
    >>> measured.sizes["k"]
    2
    """
    own = max(top_k(model).values())
    every = sorted({*checked_ks(model, ks), own})
    signals = parse_signals(["logprob"], [layer.index for layer in moe_layers(model)])
    corpus = Corpus.of(model, documents, tokenizer, settings)

    def measure(shard: Shard) -> dict[str, np.ndarray]:
        found = [_at(model, k, shard, signals, corpus.batch_tokens) for k in every]
        summed = [{name: sum_documents(shard, values) for name, values in one.items()} for one in found]
        arrays = {name: np.stack([one[name] for one in summed], axis=1) for name in summed[0]}
        lengths = lengths_of(shard)
        return arrays | {"tokens": sum_documents(shard, lengths - 1), "length": sum_documents(shard, lengths)}

    measured = measure_documents(model, corpus, stats.KIND, measure=measure, about={"ks": every, "own_k": own}, out=out)
    return stats.topk_dataset(measured)


def checked_ks(model: nn.Module, ks: int | Iterable[int] | None) -> list[int]:
    """Return the requested values of k, by default all. Raises BadInput for values out of range."""
    count = n_experts(model)
    asked = list(range(1, count + 1)) if ks is None else sorted(set(whole_numbers(ks)))
    if not asked or not 1 <= asked[0] <= asked[-1] <= count:
        raise BadInput(
            f"Cannot route every token to {', '.join(map(str, asked)) or repr(ks)} experts: the model has {count} per "
            f"layer. Pass numbers from 1 to {count}.",
            argument="ks",
            value=ks,
        )
    return asked


def _at(model: nn.Module, k: int, shard: Shard, signals: Signals, batch_tokens: int) -> dict[str, np.ndarray]:
    """Return loss [sequence], first_weight [sequence, layer] and chosen [sequence, layer, expert] at one k."""
    with edit(model, choose(k)), Reader(model, signals, batch_tokens) as reader:
        part = reader.read([piece.ids for piece in shard.pieces])
    refuse_left_out(f"measure every document with {k} experts a token", part.left_out)
    arrays = part.arrays
    sequence, ids, weight = arrays["sequence"], arrays["expert_id"], arrays["weight"]
    count, (layers, experts) = len(shard.pieces), (ids.shape[1], n_experts(model))
    loss, first = np.zeros(count), np.zeros((count, layers))
    np.add.at(loss, sequence, np.where(arrays["position"] == 0, 0.0, -arrays["logprob"].astype(np.float64)))
    strongest = weight[:, :, 0] if weight.shape[2] else np.ones(ids.shape[:2])  # the last weight is not stored
    np.add.at(first, sequence, strongest.astype(np.float64))
    chosen = np.zeros((count * experts, layers), np.int64)
    for layer in range(layers):
        cell = (sequence[:, None] * experts + ids[:, layer]).ravel()
        chosen[:, layer] = np.bincount(cell, minlength=count * experts)
    return {"loss": loss, "first_weight": first, "chosen": chosen.reshape(count, experts, layers).swapaxes(1, 2)}
