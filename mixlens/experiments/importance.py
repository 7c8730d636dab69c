"""Importance of experts: the change in loss without each expert of each layer, with intervals over documents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from mixlens.errors import BadInput
from mixlens.experiments.ablator import Ablator, Metric, quantized_expert
from mixlens.interventions.activations import digest_of
from mixlens.models.layout import expert_weights, numbered_layers
from mixlens.models.provenance import audit
from mixlens.recording.corpus import Corpus, RecordSettings, Shard, lengths_of, measure_documents, sum_documents
from mixlens.stats import importance as stats

SETTINGS = RecordSettings(shard_tokens=4096)


@dataclass(frozen=True)
class Ablation:
    """Settings of an ablation: how each expert is removed, and the metric.

    Parameters
    ----------
    how : str, optional
        "reroute" (never chosen), "zero", or "mean" with `means`, as in edits.ablate; or a quantization scheme such as
        "hqq2", as in load, to which each expert is converted in turn, for decisions.allocate_bits.
    means : Any, optional
        Mean outputs [layer, expert, hidden], such as expert_outputs(...)["mean"].
    metric : Metric, optional
        Function of logits [n, vocabulary] and the next tokens [n] that returns one number per token [n]; None for the
        loss in nats.
    layers : int or Sequence[int], optional
        Layer numbers; None for all.

    Examples
    --------
    >>> ml.experiments.Ablation(how="zero", layers=[0]).how
    'zero'
    """

    how: str = "reroute"
    means: Any = None
    metric: Metric | None = None
    layers: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and not callable(self.metric):
            raise BadInput(
                f"Cannot ablate experts with metric={self.metric!r}: it is not callable. Pass a function of logits "
                "[n, vocabulary] and the tokens that followed [n], or None for the loss.",
                argument="metric",
                value=self.metric,
            )

    def plan(self) -> dict[str, Any]:
        means = {} if self.means is None else {"means": digest_of(torch.as_tensor(np.asarray(self.means)))}
        if self.metric is None:
            return {"how": self.how, "metric": "loss", "unit": "nats", **means}
        name, digest = getattr(self.metric, "__qualname__", type(self.metric).__name__), _digest_of(self.metric)
        told = {} if digest is None else {"metric_sha256": digest}
        return {"how": self.how, "metric": name, "unit": "of the metric", **told, **means}


def expert_importance(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    by: str | Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    ablation: Ablation = Ablation(),
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Compute the change in loss without each expert of each layer, with paired intervals over documents.

    Applies stats.expert_importance to the result of measure_importance; see these for arguments and errors.
    """
    measured = measure_importance(model, documents, out=out, ablation=ablation, tokenizer=tokenizer, settings=settings)
    return stats.expert_importance(measured, by=by)


def measure_importance(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    out: str | os.PathLike[str] | None = None,
    ablation: Ablation = Ablation(),
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Measure every document with the whole model and without each expert.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    documents : Iterable[Any]
        As for record; sequences longer than settings.batch_tokens are read in chunks.
    out : str or os.PathLike, optional
        Run directory; None keeps the result in memory. A stopped run resumes where it stopped. Under
        `accelerate launch` each process measures its share of the shards, and each returns the complete result.
    ablation : Ablation, optional
        How experts are ablated.
    tokenizer : Any, optional
        Tokenizer; None for the model's own.
    settings : RecordSettings, optional
        Settings for reading the documents.

    Returns
    -------
    Dataset
        change, chosen [document, layer, expert]; value, tokens (predicted), length [document]; the columns of the
        documents as coordinates.

    Raises
    ------
    BadInput
        If documents cannot be read with these settings, a layer is unknown, or `out` is given with a metric that is not
        a self-contained function.
    RunError
        As for record.

    Examples
    --------
    >>> ablation = ml.experiments.Ablation(layers=[0])
    >>> measured = ml.experiments.measure_importance(model, documents[:2], ablation=ablation, settings=quiet)
    >>> measured.sizes["expert"]
    8
    """
    layers = [layer.index for layer in numbered_layers(model, ablation.layers, "ablate experts")]
    if out is not None and ablation.metric is not None and _digest_of(ablation.metric) is None:
        raise BadInput(
            f"Cannot save a run with metric={ablation.metric!r}: its result does not follow from its code alone, so "
            "the run could not tell it from another metric. Pass a named function without a closure, or leave out= "
            "out.",
            argument="metric",
            value=ablation.metric,
        )
    corpus = Corpus.of(model, documents, tokenizer, settings)
    ablator = Ablator(model, layers, how=ablation.how, means=ablation.means, metric=ablation.metric)

    def measure(shard: Shard) -> dict[str, np.ndarray]:
        costs = ablator.measure([piece.ids for piece in shard.pieces], corpus.batch_tokens)
        arrays = {**vars(costs), "length": lengths_of(shard)}
        return {name: sum_documents(shard, values) for name, values in arrays.items()}

    about = {"ablation": ablation.plan() | _bytes(ablator), "layers": layers}
    return stats.importance_dataset(measure_documents(model, corpus, stats.KIND, measure=measure, about=about, out=out))


def _bytes(ablator: Ablator) -> dict[str, int]:
    """Return the bytes of an expert in the scheme and in the original; empty if experts are ablated."""
    if ablator.scheme is None:
        return {}
    weights = [matrix[0] for matrix in expert_weights(next(iter(ablator.moe_layers.values())))]
    held = audit(nn.Sequential(*quantized_expert(weights, ablator.scheme))).bytes
    return {"expert_bytes": held, "whole_bytes": sum(weight.nbytes for weight in weights)}


def _digest_of(metric: Metric) -> str | None:
    """Return a digest of a metric's code; None if its result depends on more than its code."""
    if not isinstance(metric, FunctionType):
        return None
    code = metric.__code__
    if metric.__closure__ or any(isinstance(constant, CodeType) for constant in code.co_consts):
        return None
    told = repr((code.co_consts, code.co_names, metric.__defaults__, metric.__kwdefaults__))
    return hashlib.sha256(code.co_code + told.encode()).hexdigest()[:12]
