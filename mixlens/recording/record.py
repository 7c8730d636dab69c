"""record: documents through a model into a trace, in memory or as a run directory that resumes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.interventions.hooks import edits_of, top_k_of
from mixlens.models.layout import moe_layers, n_experts
from mixlens.models.provenance import describe, identity
from mixlens.recording.corpus import Corpus, RecordSettings, Shard, run_shards
from mixlens.recording.documents import table_of
from mixlens.recording.reader import Reader
from mixlens.recording.recorder import PACKAGES
from mixlens.trace import convert
from mixlens.trace import shards as store
from mixlens.trace.shards import MemoryPart
from mixlens.trace.signals import DEFAULT, Signals, Site, parse_signals
from mixlens.trace.trace import Trace, from_parts


def record(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    signals: Iterable[str | Site] = DEFAULT,
    settings: RecordSettings = RecordSettings(),
) -> Trace:
    """Record the routing of every token of `documents`.

    Under `accelerate launch` every process records its share of the shards, and each returns the whole trace.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    documents : Iterable[Any]
        Strings; mappings with a text column and any others (domain, id ...); or a datasets.Dataset.
    out : str or os.PathLike, optional
        Run directory; None keeps the trace in memory. A run that was stopped goes on where it stopped, and ends
        with the same bytes; a complete one is opened.
    tokenizer : Any, optional
        None for the one that belongs to the model.
    signals : Iterable[str or Site], optional
        Names and Sites beside expert ids and weights: router_logits, logprob, top_logprobs, and the sites of
        mixlens.trace.signals.SITES.
    settings : RecordSettings, optional
        How documents are read.

    Returns
    -------
    Trace

    Raises
    ------
    BadInput
        For documents that cannot be read as asked.
    RunError
        If `out` holds something else or cannot be written.
    ModelError
        If the model has no experts.

    Examples
    --------
    >>> found = ml.record(model, ["One text.", "Another."], settings=quiet)
    >>> len(found.sequences)
    2
    """
    layers = range(len(moe_layers(model)))
    corpus = Corpus.of(model, documents, tokenizer, settings)
    reader = Reader(model, parse_signals(signals, len(layers)), corpus.batch_tokens)
    about = describe(model)
    edits = edits_of(model)
    plan = {
        **corpus.plan(),
        "model": identity(about),
        "signals": reader.signals.plan(),
        **({"edits": edits} if edits else {}),
    }
    meta = {
        "source": "record",
        "created": now(),
        "model": about,
        "versions": versions(*PACKAGES),
        "settings": plan,
        "n_experts": n_experts(model),
        "top_k": top_k_of(model),
    }

    def compute(shard: Shard) -> tuple[MemoryPart, pd.DataFrame]:
        return reader.read([piece.ids for piece in shard.pieces], shard.first_sequence), _sequence_rows(shard)

    if out is None:
        with reader:
            parts, tables = zip(*(compute(shard) for shard in corpus.progress("recording")), strict=True)
        trace = from_parts(parts, pd.concat(tables), meta, layers)
        trace._vocabulary = corpus.vocabulary()
        return trace

    def commit(writer: RunWriter, shard: Shard) -> None:
        part, table = compute(shard)
        rows = {f"sequences-{shard.index:05d}.parquet": store.write_sequences(table)}
        writer.commit_shard(shard.index, part.files(shard.index) | rows, convert.shard_counts(part))

    with reader:
        run_shards(out, "trace", plan, corpus, commit, partial(_finish, corpus, reader.signals, layers, meta))
    return Trace.open(out)


def _finish(corpus: Corpus, signals: Signals, layers: range, meta: dict[str, Any], writer: RunWriter) -> None:
    records = writer.done
    counts = [{k: v for k, v in records[i].items() if k != "files"} for i in range(len(records))]
    tables = [writer.path / f"sequences-{index:05d}.parquet" for index in records]
    left_out = {name for name in ("router_logits", "logprob") if not getattr(signals, name)}
    left_out |= set() if signals.top_logprobs else set(store.NEXT_TOKEN)
    names = [n for n in (*store.TOKEN_COLUMNS, *store.ROUTING, *store.NEXT_TOKEN) if n not in left_out]
    meta |= {
        "created": now(),
        "reading": {"started": meta["created"], **vars(corpus.tally)},
        "layers": list(layers),
        "signals": names,
        "sites": {site.name: list(site.layers or ()) for site in signals.sites},
        "counts": {
            "tokens": sum(c["tokens"] for c in counts),
            "sequences": counts[-1]["last_sequence"] + 1,
            "documents": corpus.documents.count,
        },
        "shard_counts": counts,
    }
    files: dict[str, Any] = {"sequences.parquet": lambda path: _join_tables(tables, path)}
    if (vocabulary := corpus.vocabulary()) is not None:
        files["vocabulary.parquet"] = store.write_vocabulary(vocabulary)
    writer.finish(meta, files, drop=[table.name for table in tables])


def _join_tables(tables: list[Any], path: Any) -> None:
    schema = pa.unify_schemas([pq.read_schema(table) for table in tables], promote_options="permissive")
    with pq.ParquetWriter(path, schema, compression="zstd") as joined:
        for table in tables:
            joined.write_table(pq.read_table(table).cast(schema))


def _sequence_rows(shard: Shard) -> pd.DataFrame:
    rows = [{**piece.columns, "length": len(piece.ids)} for piece in shard.pieces]
    return table_of(rows, pd.RangeIndex(shard.first_sequence, shard.first_sequence + len(rows)))
