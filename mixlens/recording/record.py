"""record: documents through a model into a trace, in memory or as a run directory that resumes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.endpoints.endpoint import Endpoint
from mixlens.engines.check import combined
from mixlens.engines.source import SourceReader, signals_of, source_of
from mixlens.engines.vllm_engine import VLLM
from mixlens.interventions.hooks import edits_of
from mixlens.models.layout import is_sharded, moe_layers, n_experts, without_prompt
from mixlens.models.provenance import describe, identity
from mixlens.recording.corpus import Corpus, RecordSettings, Shard, run_shards
from mixlens.recording.documents import table_of
from mixlens.recording.hooks import LeftOut, warn_of_left_out, warn_of_unscored
from mixlens.recording.reader import Reader
from mixlens.recording.recorder import PACKAGES
from mixlens.trace import convert
from mixlens.trace import shards as store
from mixlens.trace.clusters import remark_on_clusters
from mixlens.trace.shards import MemoryPart
from mixlens.trace.signals import DEFAULT, Signals, Site, parse_signals
from mixlens.trace.trace import Trace, from_parts


def record(
    model: nn.Module | Endpoint | VLLM,
    documents: Iterable[Any],
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    signals: Iterable[str | Site] = DEFAULT,
    settings: RecordSettings = RecordSettings(),
) -> Trace:
    """Record the routing of every token of `documents`.

    Under `accelerate launch` every process records its share of the shards, and each returns the whole trace. A model
    that is sharded over the processes reads every shard in all of them.

    Parameters
    ----------
    model : torch.nn.Module or Endpoint or VLLM
        A loaded model, an engine (`engines.vllm`), or a server that returns routing, ``ml.Endpoint(...,
        protocol="openai-completions", routing=True)``. What engines and servers say is checked first:
        ``meta["source_check"]`` tells how. A server tells expert ids, and no weights.
    documents : Iterable[Any]
        Strings; mappings with a text column and any others (domain, id ...); a datasets.Dataset; or what `documents`
        reads from a file. A text may be a chat, a list of messages: it is written by the tokenizer's template, and the
        phase of what the assistant said is "generated".
    out : str or os.PathLike, optional
        Run directory; None keeps the trace in memory. A run that was stopped goes on where it stopped, and ends
        with the same bytes; a complete one is opened.
    tokenizer : Any, optional
        None for the one that belongs to the model.
    signals : Iterable[str or Site], optional
        Names and Sites beside expert ids and weights: router_logits, logprob, top_logprobs, and the sites of
        mixlens.trace.signals.SITES. Of an engine or a server, what it can tell of the default.
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
    MissingSignal
        If an engine or a server cannot tell a signal that is asked for.
    SourceError
        If the routing of an engine or a server cannot be that of its tokens; `argument` names the fault.

    Examples
    --------
    >>> found = ml.record(model, ["One text.", "Another."], settings=quiet)
    >>> len(found.sequences)
    2
    """
    source = source_of(model, tokenizer)
    loaded: Any = without_prompt(model) if source is None else source.skeleton
    layers = [layer.index for layer in moe_layers(loaded)]
    corpus = Corpus.of(loaded, documents, tokenizer, settings)
    reader: Reader | SourceReader
    if source is None:
        reader = Reader(loaded, parse_signals(signals, layers), corpus.batch_tokens)
        about = describe(loaded)
        told = identity(loaded, about) if out is not None else about
    else:
        reader = source.reader(signals_of(source, signals, layers))
        about = told = source.describe()
    edits = edits_of(loaded)
    plan = {
        **corpus.plan(),
        "model": told,
        "signals": reader.signals.plan(),
        **({"edits": edits} if edits else {}),
    }
    meta = {
        "source": "record" if source is None else source.name,
        "created": now(),
        "model": about,
        "versions": versions(*PACKAGES),
        "settings": plan,
        "n_experts": n_experts(loaded),
    }

    def choices(part: MemoryPart) -> dict[str, Any]:
        return store.choices_of(part.arrays["expert_id"], meta["n_experts"])

    def unscored(part: MemoryPart) -> int:
        """Tokens after others whose log-probability is NaN; one from elsewhere may just not be there."""
        if source is not None or "logprob" not in part.arrays:
            return 0
        return int((np.isnan(part.arrays["logprob"]) & (part.arrays["position"] > 0)).sum())

    def compute(shard: Shard) -> tuple[MemoryPart, pd.DataFrame]:
        phases = [piece.phase for piece in shard.pieces]
        part = reader.read([piece.ids for piece in shard.pieces], shard.first_sequence, phases)
        return part, _sequence_rows(shard, part)

    if out is None:
        with reader:
            parts, tables = zip(*(compute(shard) for shard in corpus.progress("recording")), strict=True)
            meta |= {"rule": reader.rule, **_checked(reader)}
        frame = pd.concat(tables)
        meta["left_out"] = _named([place for part in parts for place in part.left_out], frame["document_id"])
        meta |= {"unscored": sum(map(unscored, parts)), **choices(parts[0])}
        _warn(meta, frame)
        trace = from_parts(parts, frame, meta, layers)
        trace._vocabulary = corpus.vocabulary()
        return trace

    def write(writer: RunWriter, shard: Shard, found: tuple[MemoryPart, pd.DataFrame]) -> None:
        part, table = found
        rows = {f"sequences-{shard.index:05d}.parquet": store.sequence_bytes(table)}
        left_out = _named(part.left_out, table["document_id"])
        counts = convert.shard_counts(part) | {"left_out": left_out, "rule": reader.rule, "names": sorted(part.names)}
        counts |= {"unscored": unscored(part), "choices": choices(part), **_checked(reader)}
        writer.commit_shard(shard.index, part.files(shard.index), counts, interim=rows)

    with reader:
        finish = partial(_finish, corpus, reader.signals, layers, meta)
        run_shards(out, "trace", plan, corpus, compute, write, finish, together=is_sharded(loaded))
    trace = Trace.open(out)
    _warn(trace.meta, trace.sequences)
    return trace


def _warn(meta: Mapping[str, Any], sequences: pd.DataFrame) -> None:
    warn_of_left_out(meta["left_out"])
    warn_of_unscored(meta.get("unscored", 0))
    if remark := remark_on_clusters(sequences):
        warnings.warn(remark, stacklevel=3)


def _checked(reader: Reader | SourceReader) -> dict[str, Any]:
    """What was checked of routing from elsewhere since this was last asked; nothing of what a model here does."""
    return {} if isinstance(reader, Reader) else {"source_check": reader.check()}


def _named(places: list[tuple[int, int, int]], document_id: pd.Series) -> list[LeftOut]:
    return [(f"document {document_id[sequence]}", position, layer) for sequence, position, layer in places]


def _finish(corpus: Corpus, signals: Signals, layers: list[int], meta: dict[str, Any], writer: RunWriter) -> None:
    records = writer.done
    dropped = ("files", "left_out", "unscored", "choices", "rule", "names", "source_check")
    counts = [{k: v for k, v in records[i].items() if k not in dropped} for i in range(len(records))]
    tables = [pq.read_table(writer.work / f"sequences-{index:05d}.parquet") for index in records]
    kept = set.intersection(*(set(record["names"]) for record in records.values()))
    names = [n for n in (*store.TOKEN_COLUMNS, *store.ROUTING, *store.NEXT_TOKEN) if n in kept]
    checks = [record["source_check"] for record in records.values() if "source_check" in record]
    meta |= {"source_check": combined(checks)} if checks else {}
    meta |= {
        "created": now(),
        "rule": max(records[index]["rule"] for index in records),  # of "known" and "unknown", the latter
        "reading": {"started": meta["created"], **vars(corpus.tally)},
        "layers": list(layers),
        "signals": names,
        "sites": {site.name: list(site.layers or ()) for site in signals.sites},
        "counts": {
            "tokens": sum(c["tokens"] for c in counts),
            "sequences": sum(table.num_rows for table in tables),
            "documents": corpus.documents.count,
        },
        "shard_counts": counts,
        "left_out": [place for index in range(len(records)) for place in records[index]["left_out"]],
        "unscored": sum(record["unscored"] for record in records.values()),
        **records[0]["choices"],
    }
    files = {"sequences.parquet": store.parquet_bytes(_joined(tables))}
    if (vocabulary := corpus.vocabulary()) is not None:
        files["vocabulary.parquet"] = store.vocabulary_bytes(vocabulary)
    writer.finish(meta, files)


def _joined(tables: list[pa.Table]) -> pa.Table:
    schema = pa.unify_schemas([table.schema for table in tables], promote_options="permissive")
    return pa.concat_tables([table.cast(schema) for table in tables])


def _sequence_rows(shard: Shard, part: MemoryPart) -> pd.DataFrame:
    lengths = np.bincount(part.arrays["sequence"] - shard.first_sequence, minlength=len(shard.pieces))
    rows = [{**piece.columns, "length": int(n)} for piece, n in zip(shard.pieces, lengths, strict=True)]
    return table_of(rows, pd.RangeIndex(shard.first_sequence, shard.first_sequence + len(rows)))
