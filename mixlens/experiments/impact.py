"""measure_impact: a model and a changed copy of it side by side, also with each other's routing."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from mixlens.errors import BadInput, ModelError
from mixlens.interventions.edits import edit, replay
from mixlens.interventions.hooks import top_k_of
from mixlens.models.layout import (
    config_of,
    expert_weights,
    moe_layers,
    n_experts,
    refuse_without_experts,
    widths_of,
)
from mixlens.models.provenance import identity
from mixlens.recording.corpus import (
    Corpus,
    RecordSettings,
    Shard,
    lengths_of,
    measure_documents,
    sum_documents,
    tokenizer_of,
    vocabulary_of,
)
from mixlens.recording.hooks import Raw, gather
from mixlens.recording.reader import Reader, batches
from mixlens.stats.impact import CONDITIONS, KIND, MATRICES, Impact
from mixlens.trace.signals import parse_signals
from mixlens.trace.trace import Trace
from mixlens.trace.vocabulary import same_tokenizer

SETTINGS = RecordSettings(shard_tokens=16_384)
_ROWS = 256  # tokens per chunk, since each needs four predictions over the whole vocabulary


def measure_impact(
    model_a: nn.Module,
    model_b: nn.Module,
    documents: Iterable[Any],
    *,
    out: str | os.PathLike[str] | None = None,
    force_weights: bool = False,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> Impact:
    """Measure how changed weights affect predictions, routing and every expert, and separate the causes.

    Every document is read four times: by each model with its own routing, and by each with the experts that the other
    chose for the same tokens, in every layer. This splits the change in quality into the part of changed routing and
    the rest, which is attributed to weights only if both models compute in the same dtype with the same kinds of
    layers. If the dtypes differ, a copy of the first model in the dtype of the second reads the documents a fifth time,
    to isolate the effect of arithmetic; the copy takes memory. It is omitted if the first model is quantized or spread
    over several devices.

    Parameters
    ----------
    model_a, model_b : torch.nn.Module
        The original and the changed model, both loaded; their devices may differ.
    documents : Iterable[Any]
        As for record.
    out : str or os.PathLike, optional
        Run directory; None keeps the result in memory. A stopped run resumes where it stopped.
    force_weights : bool, optional
        Whether a model with the other's routing also uses the other's router weights (kept in half precision);
        otherwise it weights the given experts itself.
    tokenizer : Any, optional
        Tokenizer; None for that of model_a.
    settings : RecordSettings, optional
        Settings for reading the documents.

    Returns
    -------
    Impact

    Raises
    ------
    BadInput
        If the models differ in shape or tokenizer, or documents cannot be read with these settings.
    RunError
        If `out` holds another run or cannot be written.

    Examples
    --------
    >>> rounded = ml.load("demo", dtype="bfloat16", verbose=False)
    >>> impact = ml.experiments.measure_impact(model, rounded, documents[:2], settings=quiet)
    >>> type(impact).__name__
    'Impact'
    """
    for layer in (*moe_layers(model_a), *moe_layers(model_b)):
        refuse_without_experts(layer, "measure the impact of quantization", inside=True)
    _same_shape(model_a, model_b)
    if tokenizer is None:
        tokenizer = tokenizer_of(model_a)
        same_tokenizer(vocabulary_of(tokenizer), _vocabulary_of(model_b))
    corpus = Corpus.of(model_a, documents, tokenizer, settings)
    other = identity(model_b)
    pair = _Pair(model_a, model_b, corpus.batch_tokens, force_weights)
    about = {
        "other": other,
        "force_weights": force_weights,
        "same_arithmetic": _computes(model_a) == _computes(model_b),
    }
    measured = measure_documents(model_a, corpus, KIND, measure=pair.measure, about=about, out=out)
    return Impact(measured, path=None if out is None else Path(out))


@dataclass(frozen=True)
class _Pass:
    """Result of a forward pass: last states [token, H], experts [token, layer, slot] and their weights."""

    states: torch.Tensor
    ids: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class _Batch:
    """Sequences that are read together, on one flat token axis.

    sequence   [token] number within the batch
    token_id   [token]
    following  [token] id of the next token, -1 at the end of a sequence
    """

    sequences: list[np.ndarray]
    sequence: np.ndarray
    token_id: np.ndarray
    following: np.ndarray

    @staticmethod
    def of(sequences: list[np.ndarray]) -> _Batch:
        number = np.repeat(np.arange(len(sequences)), [len(ids) for ids in sequences])
        following = np.concatenate([np.append(ids[1:], -1) for ids in sequences])
        return _Batch(sequences, number, np.concatenate(sequences), following)


class _Pair:
    """Two models that read the same batches."""

    def __init__(self, model_a: nn.Module, model_b: nn.Module, batch_tokens: int, force_weights: bool) -> None:
        self.a: Any = model_a
        self.b: Any = model_b
        self.batch_tokens, self.force_weights = batch_tokens, force_weights
        self.layers = list(zip(moe_layers(model_a), moe_layers(model_b), strict=True))
        self.n_experts = n_experts(model_a)
        self.a_cast: Any = self.a if self.a.dtype == self.b.dtype else _cast(model_a, self.b.dtype)

    @torch.no_grad()  # torchao's weights cannot be detached in inference mode
    def measure(self, shard: Shard) -> dict[str, np.ndarray]:
        """Return sums over every document of a shard, in the form that Impact expects."""
        sequences, lengths = [piece.ids for piece in shard.pieces], lengths_of(shard)
        totals = self._zeros(len(sequences))
        for rows in batches(lengths, self.batch_tokens):
            for name, values in self._measure_batch(_Batch.of([sequences[row] for row in rows])).items():
                totals[name][rows] = values
        summed = {name: sum_documents(shard, values) for name, values in totals.items()}
        # Weight errors belong to no document: they are measured once and stored with the first shard.
        errors = self._weight_errors() if shard.index == 0 else np.empty((0, len(self.layers), self.n_experts, 3))
        return summed | {"length": sum_documents(shard, lengths), "weight_error": errors}

    def _zeros(self, n: int) -> dict[str, np.ndarray]:
        layers = len(self.layers)
        return {
            **{name: np.zeros((n, len(CONDITIONS))) for name in ("loss", "kl", "same_top")},
            **{name: np.zeros((n, layers)) for name in ("same_first", "shared")},
            **{name: np.zeros((n, layers, self.n_experts)) for name in ("error", "size", "chosen")},
            "tokens": np.zeros(n, np.int64),
        }

    def _measure_batch(self, batch: _Batch) -> dict[str, np.ndarray]:
        """Return sums over every sequence of the batch."""
        sums = self._zeros(len(batch.sequences))
        a = self._read(self.a, batch, outputs=sums)
        b = self._read(self.b, batch)
        with edit(self.b, self._routing_of(a, batch)):
            b_routed_as_a = self._read(self.b, batch)
        with edit(self.a, self._routing_of(b, batch)):
            a_routed_as_b = self._read(self.a, batch)
        a_cast = None if self.a_cast is None else a if self.a_cast is self.a else self._read(self.a_cast, batch)
        passes = (a, b, b_routed_as_a, a_routed_as_b, a_cast)
        states = [None if one is None else one.states for one in passes]
        predicted = batch.sequence[batch.following >= 0]
        for name, values in self._predictions(states, batch.following).items():
            np.add.at(sums[name], predicted, values)
        np.add.at(sums["tokens"], predicted, 1)
        np.add.at(sums["same_first"], batch.sequence, a.ids[..., 0] == b.ids[..., 0])
        np.add.at(sums["shared"], batch.sequence, (a.ids[..., :, None] == b.ids[..., None, :]).sum((-1, -2)))
        return sums

    def _read(self, model: Any, batch: _Batch, outputs: dict[str, np.ndarray] | None = None) -> _Pass:
        """Read the batch with a model in its current state; add errors of expert outputs to the sums `outputs`."""
        order, states, ids, weights = [], [], [], []
        signals = parse_signals([] if outputs is None else ["moe_in"], [layer.index for layer, _ in self.layers])
        with Reader(model, signals, self.batch_tokens) as reader:
            for tokens, picked, raw, last in reader.placed(batch.sequences):
                order.append(tokens)
                states.append(last[picked.to(last.device)])
                ids.append(gather(raw["expert_id"], picked).numpy())
                weights.append(gather(raw["weight"], picked).float().numpy())
                if outputs is not None:
                    self._add_output_errors(raw, picked, batch.sequence[tokens], outputs)
        back = np.argsort(np.concatenate(order))
        return _Pass(torch.cat(states)[back], np.concatenate(ids)[back], np.concatenate(weights)[back])

    def _routing_of(self, one: _Pass, batch: _Batch) -> Any:
        tokens = {"sequence": batch.sequence, "token_id": batch.token_id}
        layers = [layer.index for layer, _ in self.layers]
        trace = Trace.from_arrays(one.ids, n_experts=self.n_experts, weight=one.weights, tokens=tokens, layers=layers)
        return replay(trace, weights=self.force_weights)

    def _predictions(self, states: list[torch.Tensor | None], following: np.ndarray) -> dict[str, np.ndarray]:
        """Return loss, kl and same_top [predicted token, condition], computing a few rows of logits at a time."""
        predicts = torch.from_numpy(np.flatnonzero(following >= 0))
        target = torch.from_numpy(following)[predicts]
        found = {name: np.full((len(predicts), len(CONDITIONS)), np.nan) for name in ("loss", "kl", "same_top")}
        heads = [getattr(model, "lm_head", None) for model in (self.a, self.b, self.b, self.a, self.a_cast)]
        for start in range(0, len(predicts), _ROWS):
            rows = slice(start, start + _ROWS)
            of_a = None
            for condition, (head, state) in enumerate(zip(heads, states, strict=True)):
                if head is None or state is None:
                    continue
                logp = torch.log_softmax(head(state[predicts[rows].to(state.device)]).float(), dim=-1)
                of_a = logp if of_a is None else of_a
                logp = logp.to(of_a.device)
                loss = -logp.gather(1, target[rows].to(logp.device)[:, None])[:, 0]
                divergence = (of_a.exp() * (of_a - logp)).sum(-1)
                same = logp.argmax(-1) == of_a.argmax(-1)
                for name, values in (("loss", loss), ("kl", divergence), ("same_top", same)):
                    found[name][rows, condition] = values.double().cpu().numpy()
        return found

    def _add_output_errors(
        self, raw: Raw, picked: torch.Tensor, sequence: np.ndarray, sums: dict[str, np.ndarray]
    ) -> None:
        """Add squared errors and sizes of the output of every chosen expert, for both models given the input in a."""
        for row, (layer, other) in enumerate(self.layers):
            hidden, chosen = raw["moe_in"][layer.index].flatten(0, -2), raw["expert_id"][layer.index]
            hidden, chosen = hidden[picked.to(hidden.device)], chosen[picked.to(chosen.device)]
            # accelerate keeps offloaded weights on the meta device and stores their execution device in the hook.
            hook = getattr(other.experts, "_hf_hook", None)
            there = getattr(hook, "execution_device", None)
            there = other.router_weight.device if there is None else there
            for ids in chosen.split(1, dim=1):
                one = torch.ones(ids.shape, device=hidden.device)
                a = layer.experts(hidden, ids.to(hidden.device), one).float()
                b = other.experts(hidden.to(there, self.b.dtype), ids.to(there), one.to(there)).float().to(a.device)
                expert = ids[:, 0].cpu().numpy()
                for name, values in (("error", b - a), ("size", a)):
                    squares = values.square().sum(-1).double().cpu().numpy()
                    np.add.at(sums[name][:, row], (sequence, expert), squares)
                np.add.at(sums["chosen"][:, row], (sequence, expert), 1)

    def _weight_errors(self) -> np.ndarray:
        """Return ||W_b - W_a|| / ||W_a|| [1, layer, expert, matrix]; NaN in layers whose weights are offloaded."""
        found = np.full((1, len(self.layers), self.n_experts, len(MATRICES)), np.nan)
        for row, (layer, other) in enumerate(self.layers):
            try:
                pairs = list(zip(expert_weights(layer), expert_weights(other), strict=True))
            except ModelError:
                continue
            for column, (a, b) in enumerate(pairs):
                for expert in range(self.n_experts):
                    before, after = a[expert].float(), b[expert].to(a.device).float()
                    found[0, row, expert, column] = float((after - before).norm() / before.norm())
        return found


def _computes(model: Any) -> tuple[Any, ...]:
    """Return what determines a model's rounding: dtype, experts and attention implementation, and kinds of layers."""
    ways = (getattr(model.config, f"_{of}_implementation", None) for of in ("experts", "attn"))
    return (model.dtype, *ways, sorted({type(module).__qualname__ for module in model.modules()}))


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy of the model in another dtype; None if its weights are packed or on several devices."""
    plain = all(p.dtype == model.dtype for p in model.parameters())
    return copy.deepcopy(model).to(dtype) if plain and len({p.device for p in model.parameters()}) == 1 else None


def _same_shape(model_a: Any, model_b: Any) -> None:
    """Raise BadInput unless the two models differ only in weights."""
    for what, of_a, of_b in (
        ("layers", len(moe_layers(model_a)), len(moe_layers(model_b))),
        ("experts a layer", n_experts(model_a), n_experts(model_b)),
        ("experts a token", top_k_of(model_a), top_k_of(model_b)),
        ("hidden units", config_of(model_a).hidden_size, config_of(model_b).hidden_size),
        ("neurons an expert", *(widths_of(moe_layers(model)[0])[1] for model in (model_a, model_b))),
        ("tokens in the vocabulary", config_of(model_a).vocab_size, config_of(model_b).vocab_size),
    ):
        if of_a != of_b:
            raise BadInput(
                f"Cannot measure the impact of quantization: the first model has {of_a} {what}, the second {of_b}. "
                "Pass a model and a quantized copy of it.",
                argument=what,
                value=(of_a, of_b),
            )


def _vocabulary_of(model: nn.Module) -> pd.Series | None:
    """Return the vocabulary of a model's own tokenizer; None if it has no tokenizer."""
    try:
        return vocabulary_of(tokenizer_of(model))
    except BadInput:
        return None
