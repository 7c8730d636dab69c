"""Loss and routing when every token chooses k experts, for each k."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from mixlens.models.layout import describe, n_experts, top_k
from mixlens.stats.bootstrap import DEFAULT, Bootstrap
from mixlens.stats.importance import groups_of, per_token
from mixlens.traces.edits import edit
from mixlens.traces.edits import top_k as choose
from mixlens.traces.record import RecordSettings, record
from mixlens.traces.trace import Trace

SETTINGS = RecordSettings()


def topk_sweep(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    by: str | Sequence[str] | None = None,
    ks: Iterable[int] | None = None,
    bootstrap: Bootstrap = DEFAULT,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Loss at every k, and its change against the model's own k, on the same tokens.

    ks  numbers of experts a token chooses; None for 1 to all

    Returns  Dataset   estimate, ci_low, ci_high, loss in nats a token [*by, k]; change, change_low, change_high, the
                       same tokens' difference to the model's own k; n (predicted tokens), n_documents [*by]; share [k,
                       layer, expert] and first_weight [k, layer], mean weight of the strongest expert
    Raises   BadInput  for a k the model has not, documents that cannot be read as asked, and an unknown column in `by`
    """
    documents, own = list(documents), top_k(model)
    ks = list(range(1, n_experts(model) + 1)) if ks is None else sorted({int(k) for k in ks})
    losses: dict[int, np.ndarray] = {}
    routing: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for k in sorted({*ks, own}):
        with edit(model, choose(k)):
            trace = record(model, documents, tokenizer=tokenizer, signals=["logprob"], settings=settings)
        losses[k], tokens, table = _losses(trace)
        routing[k] = _routing(trace)
    labels, group = groups_of(table, [by] if isinstance(by, str) else list(by or []))
    shape = tuple(len(values) for values in labels.values())
    n_groups = int(np.prod(shape, dtype=int))
    numbers = {name: np.full((n_groups, len(ks)), np.nan) for name in ("estimate", "ci_low", "ci_high")}
    change = {name: np.full((n_groups, len(ks)), np.nan) for name in ("change", "change_low", "change_high")}
    n, n_documents = np.zeros((2, n_groups), np.int64)
    every = np.stack([losses[k] for k in ks], axis=1)
    for one in range(n_groups):
        here = np.flatnonzero((group == one) & (tokens > 0))
        if not len(here):
            continue
        n[one], n_documents[one] = int(tokens[here].sum()), len(here)
        for into, sums in ((numbers, every[here]), (change, every[here] - losses[own][here, None])):
            for name, values in zip(into, per_token(sums, tokens[here].astype(float), bootstrap, one), strict=True):
                into[name][one] = values
    data = {name: ((*labels, "k"), values.reshape(*shape, len(ks))) for name, values in (numbers | change).items()}
    data |= {name: (tuple(labels), v.reshape(shape)) for name, v in (("n", n), ("n_documents", n_documents))}
    data["share"] = (("k", "layer", "expert"), np.stack([routing[k][0] for k in ks]))
    data["first_weight"] = (("k", "layer"), np.stack([routing[k][1] for k in ks]))
    coords = {**labels, "k": ks, "layer": range(data["share"][1].shape[1]), "expert": range(n_experts(model))}
    how = {"level": bootstrap.level, "replicates": bootstrap.replicates, "seed": bootstrap.seed}
    about = {"statistic": "topk_sweep", "unit": "nats", "own_k": own, "model": describe(model)["name"]}
    return xr.Dataset(data, coords, {**about, **how, "source": "ablation measured by mixlens"})


def _losses(trace: Trace) -> tuple[np.ndarray, np.ndarray, xr.Dataset]:
    """(loss summed over each document, its predicted tokens, the documents' columns)."""
    sequences = trace.sequences
    table = sequences.drop_duplicates("document_id").drop(columns="length")
    number = {document: index for index, document in enumerate(table["document_id"])}
    of_sequence = sequences["document_id"].map(number)
    loss, tokens = np.zeros(len(table)), np.zeros(len(table), np.int64)
    for block in trace.blocks("sequence", "logprob"):
        known = np.isfinite(block["logprob"])
        document = of_sequence.loc[block["sequence"][known]].to_numpy()
        np.add.at(loss, document, -block["logprob"][known].astype(np.float64))
        np.add.at(tokens, document, 1)
    coords = {name: ("document", table[name].to_numpy(object)) for name in table}
    return loss, tokens, xr.Dataset(coords=coords | {"document": range(len(table))})


def _routing(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(share [layer, expert], mean weight of slot 0 [layer])."""
    chosen = np.zeros((trace.n_layers, trace.n_experts))
    first = np.zeros(trace.n_layers)
    for block in trace.blocks("expert_id", "weight"):
        for layer in range(trace.n_layers):
            chosen[layer] += np.bincount(block["expert_id"][:, layer].reshape(-1), minlength=trace.n_experts)
        first += block["weight"][:, :, 0].sum(0)
    return chosen / chosen.sum(1, keepdims=True), first / trace.n_tokens
