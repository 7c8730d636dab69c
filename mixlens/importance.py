"""Which experts matter, and for what: maps over every layer and expert, from documents to intervals."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xarray as xr
from safetensors.numpy import save_file
from torch import nn
from tqdm import tqdm

from mixlens.errors import BadInput
from mixlens.models.layout import describe, moe_layers, n_experts
from mixlens.runs import RunWriter, now, versions
from mixlens.stats import importance as stats
from mixlens.traces.ablating import Ablator, Metric
from mixlens.traces.documents import Documents, Tally
from mixlens.traces.editing import edits_of, top_k_of
from mixlens.traces.patches import digest_of
from mixlens.traces.record import RecordSettings, Shard, batch_size, length_limit, shards_of, tokenizer_of
from mixlens.traces.recorder import PACKAGES

SETTINGS = RecordSettings(shard_tokens=4096)


@dataclass(frozen=True)
class Ablation:
    """What is done to each expert in turn, and what is measured.

    how     "reroute" (never chosen), "zero", or "mean" with `means`; as edits.ablate
    means   xarray [layer, expert, hidden], as expert_outputs(...)["mean"]
    metric  from logits [n, vocabulary] and the tokens that came [n] to a number for each [n]; None for the loss in nats
    layers  layer numbers; None for all
    """

    how: str = "reroute"
    means: Any = None
    metric: Metric | None = None
    layers: Sequence[int] | None = None

    def plan(self) -> dict[str, Any]:
        means = {} if self.means is None else {"means": digest_of(torch.as_tensor(np.asarray(self.means)))}
        name = "loss" if self.metric is None else getattr(self.metric, "__qualname__", repr(self.metric))
        return {"how": self.how, "metric": name, "unit": "nats" if self.metric is None else "of the metric", **means}


def expert_importance(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    by: str | Sequence[str] | None = None,
    out: str | os.PathLike | None = None,
    ablation: Ablation = Ablation(),
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Change in loss without each expert of each layer, with paired intervals over documents.

    The map of stats.expert_importance over what measure_importance measures; arguments and errors are theirs.
    """
    measured = measure_importance(model, documents, out=out, ablation=ablation, tokenizer=tokenizer, settings=settings)
    return stats.expert_importance(measured, by=by)


def measure_importance(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    out: str | os.PathLike | None = None,
    ablation: Ablation = Ablation(),
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Sums over every document, with the whole model and without each expert: what maps are made of.

    documents  as for record; each sequence is read in one forward, however long
    out        run directory; None keeps the result in memory. A run that was stopped goes on where it stopped

    Returns  Dataset   change, chosen [document, layer, expert]; value, tokens (predicted), length [document]; the
                       documents' columns as coordinates
    Raises   BadInput  for documents that cannot be read as asked, and unknown layers; RunError as record
    """
    corpus = Documents(documents, settings.text)
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    layers = _layers(model, ablation)
    limit, batch_tokens = length_limit(model, settings), batch_size(model, settings)
    about = describe(model)
    meta = {
        "created": now(),
        "model": about,
        "versions": versions(*PACKAGES),
        "layers": layers,
        "n_experts": n_experts(model),
        "top_k": top_k_of(model),
        "ablation": ablation.plan(),
    }
    plan = {
        "input_sha256": corpus.digest,
        "documents": corpus.count,
        "model": {key: value for key, value in about.items() if key not in ("devices", "class")},
        "tokenizer": str(getattr(tokenizer, "name_or_path", "")),
        "ablation": ablation.plan(),
        "layers": layers,
        "max_length": limit,
        "overlong": settings.overlong,
        "batch_tokens": batch_tokens,
        "shard_tokens": settings.shard_tokens,
        **({"edits": edits} if (edits := edits_of(model)) else {}),
    }
    ablator = Ablator(model, layers, how=ablation.how, means=ablation.means, metric=ablation.metric)
    writer = None if out is None else RunWriter(out, stats.KIND, plan)
    if writer is not None and writer.complete:
        return stats.open_importance(writer.path)
    done = {} if writer is None else writer.done
    parts = []
    with tqdm(total=corpus.count, unit="doc", disable=not settings.progress, desc="ablating") as bar:
        for shard in shards_of(corpus, tokenizer, limit, settings, Tally()):
            if shard.index not in done:
                arrays, table = _measure(ablator, shard, batch_tokens)
                if writer is None:
                    parts.append((arrays, table))
                else:
                    _commit(writer, shard.index, arrays, table)
            bar.update(shard.documents)
    if writer is None:
        joined = {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in parts[0][0]}
        table = pd.concat([table for _, table in parts], ignore_index=True)
        return stats.measured_dataset(joined, {name: table[name].tolist() for name in table}, meta)
    tables = [f"documents-{index:05d}.parquet" for index in writer.done]
    joined = pa.concat_tables([pq.read_table(writer.path / name) for name in tables], promote_options="permissive")
    writer.finish(meta, {"documents.parquet": lambda path: pq.write_table(joined, path)}, drop=tables)
    return stats.open_importance(writer.path)


def _measure(ablator: Ablator, shard: Shard, batch_tokens: int) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Sums over the documents of a shard, and their columns."""
    costs = ablator.measure([piece.ids for piece in shard.pieces], batch_tokens)
    table = pd.DataFrame([piece.columns for piece in shard.pieces])
    of_sequence, _ = pd.factorize(table["document_id"])
    lengths = np.array([len(piece.ids) for piece in shard.pieces])

    def summed(values: np.ndarray) -> np.ndarray:
        total = np.zeros((shard.documents, *values.shape[1:]), values.dtype)
        np.add.at(total, of_sequence, values)
        return total

    arrays = {name: summed(values) for name, values in vars(costs).items()}
    return arrays | {"length": summed(lengths)}, table.drop_duplicates("document_id", ignore_index=True)


def _commit(writer: RunWriter, index: int, arrays: dict[str, np.ndarray], table: pd.DataFrame) -> None:
    rows = pa.Table.from_pandas(table, preserve_index=False)
    files = {
        f"importance-{index:05d}.safetensors": lambda path: save_file(arrays, path),
        f"documents-{index:05d}.parquet": lambda path: pq.write_table(rows, path),
    }
    writer.commit_shard(index, files, {"documents": len(table), "tokens": int(arrays["length"].sum())})


def _layers(model: nn.Module, ablation: Ablation) -> list[int]:
    count = len(moe_layers(model))
    layers = list(range(count)) if ablation.layers is None else sorted({int(layer) for layer in ablation.layers})
    if not layers or not 0 <= layers[0] <= layers[-1] < count:
        raise BadInput(
            f"Experts of layers {layers} were to be ablated. The model has layers 0 to {count - 1}. "
            "Give numbers among them."
        )
    return layers
