"""Measuring documents shard by shard: in memory, or as a run that resumes, in one process or several."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file
from torch import nn
from tqdm import tqdm

from mixlens.core.distributed import Processes, processes
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.errors import BadInput
from mixlens.interventions.hooks import edits_of, top_k_of
from mixlens.models.layout import n_experts
from mixlens.models.provenance import describe
from mixlens.recording.documents import Documents, Tally
from mixlens.recording.record import (
    RecordSettings,
    Shard,
    batch_size,
    length_limit,
    shards_of,
    tokenizer_of,
    vocabulary_of,
)
from mixlens.recording.recorder import PACKAGES
from mixlens.stats.measured import VOCABULARY, Measured, read_measured
from mixlens.trace import shards as store

Measure = Callable[[Shard], dict[str, np.ndarray]]
# What measurements call their own numbers and axes, beside which the documents' columns are to stand.
_TAKEN = frozenset({
    "change", "chosen", "condition", "error", "expert", "expert_id", "first_weight", "k", "kl", "layer", "logit",
    "loss", "matrix", "next_id", "norm", "peak", "piece", "position", "same_first", "same_top", "shared", "size",
    "slot", "token_id", "tokens", "value", "weight", "weight_error",
})  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Documents, and how a model is to read them."""

    documents: Documents
    tokenizer: Any
    limit: int
    batch_tokens: int
    settings: RecordSettings

    @staticmethod
    def of(model: nn.Module, documents: Iterable[Any], tokenizer: Any, settings: RecordSettings) -> Corpus:
        """Raises BadInput for documents that cannot be read as asked, or have a column called like what is measured."""
        limit, tokens = length_limit(model, settings), batch_size(model, settings)
        checked = Documents(documents, settings.text)
        if taken := sorted(_TAKEN & next(iter(checked)).columns.keys()):
            raise BadInput(
                f"Documents were to be measured. They have a column called {', '.join(taken)}, as numbers that mixlens "
                "measures are. Rename it.",
                argument=taken[0],
                value=taken,
            )
        return Corpus(
            checked,
            tokenizer if tokenizer is not None else tokenizer_of(model),
            limit,
            tokens,
            settings,
        )

    def shards(self) -> Iterator[Shard]:
        return shards_of(self.documents, self.tokenizer, self.limit, self.settings, Tally())

    def vocabulary(self) -> pd.Series | None:
        return vocabulary_of(self.tokenizer)

    def plan(self) -> dict[str, Any]:
        return {
            "input_sha256": self.documents.digest,
            "documents": self.documents.count,
            "tokenizer": str(getattr(self.tokenizer, "name_or_path", "")),
            "max_length": self.limit,
            "overlong": self.settings.overlong,
            "batch_tokens": self.batch_tokens,
            "shard_tokens": self.settings.shard_tokens,
        }


def measure_documents(
    model: nn.Module,
    corpus: Corpus,
    kind: str,
    *,
    measure: Measure,
    about: Mapping[str, Any],
    out: str | os.PathLike | None,
    vocabulary: bool = False,
) -> Measured:
    """What `measure` finds in every shard of the corpus, put together.

    measure     from a shard to arrays along its documents or its tokens
    about       what decides the numbers beside the model and the corpus, as plain JSON values
    out         run directory; None keeps the result in memory. A run that was stopped goes on where it stopped. Under
                `accelerate launch` every process then measures its share of the shards, and each gets the whole
    vocabulary  whether the run keeps the pieces of the tokenizer

    Raises RunError when `out` holds something else or cannot be written.
    """
    meta = {
        "created": now(),
        "model": describe(model),
        "versions": versions(*PACKAGES),
        "n_experts": n_experts(model),
        "top_k": top_k_of(model),
        **about,
    }
    if out is None:
        parts = [(measure(shard), documents_of(shard)) for shard in _progress(corpus, kind, leads=True)]
        joined = {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in parts[0][0]}
        tables = pd.concat([table for _, table in parts], ignore_index=True)
        tables = tables.astype(object).where(tables.notna(), None)
        return Measured(joined, tables, meta, corpus.vocabulary() if vocabulary else None)
    described = {key: value for key, value in meta["model"].items() if key not in ("devices", "class")}
    plan = {**corpus.plan(), "model": described, **about, **({"edits": e} if (e := edits_of(model)) else {})}
    peers = processes()
    if not peers.leads:
        peers.wait()
    writer = RunWriter(out, kind, plan, leader=peers.leads)
    if peers.leads:
        peers.wait()
    if not writer.complete:
        _measure_to_disk(writer, corpus, measure, peers)
        peers.wait()
        if peers.leads:
            _finish(writer, meta, corpus.vocabulary() if vocabulary else None)
    peers.wait()
    return read_measured(out, kind)


def documents_of(shard: Shard) -> pd.DataFrame:
    """One row a document of a shard, with the caller's columns."""
    table = pd.DataFrame([piece.columns for piece in shard.pieces])
    return table.drop_duplicates("document_id", ignore_index=True)


def sum_documents(shard: Shard, values: np.ndarray) -> np.ndarray:
    """[document, ...] of values of every sequence [sequence, ...] of a shard."""
    of_sequence, _ = pd.factorize(pd.Series([piece.columns["document_id"] for piece in shard.pieces], dtype=object))
    total = np.zeros((shard.documents, *values.shape[1:]), values.dtype)
    np.add.at(total, of_sequence, values)
    return total


def lengths_of(shard: Shard) -> np.ndarray:
    """Tokens of every sequence."""
    return np.array([len(piece.ids) for piece in shard.pieces])


def _progress(corpus: Corpus, kind: str, *, leads: bool) -> Iterator[Shard]:
    hidden = not (corpus.settings.progress and leads)
    with tqdm(total=corpus.documents.count, unit="doc", disable=hidden, desc=kind) as bar:
        for shard in corpus.shards():
            yield shard
            bar.update(shard.documents)


def _measure_to_disk(writer: RunWriter, corpus: Corpus, measure: Measure, peers: Processes) -> None:
    done = writer.done
    try:
        for shard in _progress(corpus, writer.kind, leads=peers.leads):
            if shard.index % peers.world == peers.rank and shard.index not in done:
                _commit(writer, shard, measure(shard))
    except KeyboardInterrupt:
        print(
            f"\nStopped. {len(writer.done)} shards are complete in {writer.path}; the same call goes on from there.",
            file=sys.stderr,
        )
        raise


def _commit(writer: RunWriter, shard: Shard, arrays: dict[str, np.ndarray]) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    rows = pa.Table.from_pandas(documents_of(shard), preserve_index=False)
    files: dict[str, Callable[[Path], None]] = {
        f"{writer.kind}-{shard.index:05d}.safetensors": lambda path: save_file(arrays, path),
        f"documents-{shard.index:05d}.parquet": lambda path: pq.write_table(rows, path),
    }
    writer.commit_shard(shard.index, files, {"documents": shard.documents, "tokens": int(lengths_of(shard).sum())})


def _finish(writer: RunWriter, meta: dict[str, Any], vocabulary: pd.Series | None) -> None:
    done = writer.done
    tables = [f"documents-{index:05d}.parquet" for index in done]
    joined = pa.concat_tables([pq.read_table(writer.path / name) for name in tables], promote_options="permissive")
    files: dict[str, Callable[[Path], None]] = {"documents.parquet": lambda path: pq.write_table(joined, path)}
    if vocabulary is not None:
        files[VOCABULARY] = store.write_vocabulary(vocabulary)
    counts = {name: sum(record[name] for record in done.values()) for name in ("documents", "tokens")}
    writer.finish({**meta, "counts": counts}, files, drop=tables)
