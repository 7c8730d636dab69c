"""record: documents through a model into a trace, in memory or as a run directory that resumes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from tqdm import tqdm

from mixlens.core.distributed import Processes, processes
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.errors import BadInput
from mixlens.interventions.hooks import edits_of, top_k_of
from mixlens.models.hub import tokenizer_beside
from mixlens.models.layout import context_length, input_device, moe_layers, n_experts
from mixlens.models.provenance import describe
from mixlens.recording.documents import OVERLONG, Documents, Piece, Tally, pieces_of
from mixlens.recording.reader import Reader
from mixlens.recording.recorder import PACKAGES
from mixlens.trace import convert
from mixlens.trace import shards as store
from mixlens.trace.signals import DEFAULT, Signals, Site, parse_signals
from mixlens.trace.trace import Trace, from_parts


@dataclass(frozen=True)
class RecordSettings:
    """How documents are read.

    text          name of the text column
    max_length    tokens a sequence; None for the model's context
    overlong      what happens to a longer document: "error", "truncate" (counted), or "split" into sequences
    batch_tokens  tokens a forward, padding included; None for 4,096 on a CPU and 16,384 on an accelerator. A longer
                  sequence is read alone, in chunks of this size, with a key-value cache
    shard_tokens  tokens after which a shard is closed; a killed run loses at most the open shard
    progress      whether to show a progress bar
    """

    text: str = "text"
    max_length: int | None = None
    overlong: str = "error"
    batch_tokens: int | None = None
    shard_tokens: int = 65_536
    progress: bool = True


def record(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    out: str | os.PathLike | None = None,
    tokenizer: Any = None,
    signals: Iterable[str | Site] = DEFAULT,
    settings: RecordSettings = RecordSettings(),
) -> Trace:
    """Record the routing of every token of `documents`.

    documents  strings; mappings with a text column and any others (domain, id ...); or a datasets.Dataset
    out        run directory; None keeps the trace in memory. A run that was stopped goes on where it stopped, and ends
               with the same bytes; a complete one is opened
    tokenizer  None for the one that belongs to the model
    signals    names and Sites beside expert ids and weights: router_logits, logprob, top_logprobs, and the sites of
               mixlens.trace.signals.SITES

    Under `accelerate launch` every process records its share of the shards, and each returns the whole trace.

    Raises BadInput for documents that cannot be read as asked, RunError when `out` holds something else or cannot be
    written, ModelError when the model has no experts.
    """
    reader = Reader(model, parse_signals(signals, len(moe_layers(model))), batch_size(model, settings))
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    corpus = Documents(documents, settings.text)
    limit = length_limit(model, settings)
    plan = {
        "input_sha256": corpus.digest,
        "documents": corpus.count,
        "model": {k: v for k, v in describe(model).items() if k not in ("devices", "class")},
        "tokenizer": str(getattr(tokenizer, "name_or_path", "")),
        "signals": reader.signals.plan(),
        "max_length": limit,
        "overlong": settings.overlong,
        "batch_tokens": reader.batch_tokens,
        "shard_tokens": settings.shard_tokens,
        **({"edits": edits} if (edits := edits_of(model)) else {}),
    }
    peers = processes()
    if out is None:
        return _record_in_memory(model, reader, shards_of(corpus, tokenizer, limit, settings, Tally()), tokenizer, plan)
    if not peers.leads:
        peers.wait()
    writer = RunWriter(out, "trace", plan, leader=peers.leads)
    if peers.leads:
        peers.wait()
    if not writer.complete:
        _record_to_disk(model, reader, writer, _Corpus(corpus, tokenizer, limit, settings), peers)
    peers.wait()
    return Trace.open(out)


@dataclass
class _Corpus:
    documents: Documents
    tokenizer: Any
    limit: int
    settings: RecordSettings


@dataclass(frozen=True)
class Shard:
    index: int
    first_sequence: int
    documents: int
    pieces: list[Piece]


def shards_of(
    documents: Documents, tokenizer: Any, limit: int, settings: RecordSettings, tally: Tally
) -> Iterator[Shard]:
    """Fixed slices of the documents, whoever computes them: a shard closes with the document that fills it."""
    index, first, tokens, count, pieces = 0, 0, 0, 0, []
    for document in documents:
        ids = tokenizer(document.text)["input_ids"]
        pieces += (new := pieces_of(document, ids, limit, settings.overlong, tally))
        tokens, count = tokens + sum(len(piece.ids) for piece in new), count + 1
        if tokens >= settings.shard_tokens:
            yield Shard(index, first, count, pieces)
            index, first, tokens, count, pieces = index + 1, first + len(pieces), 0, 0, []
    if pieces:
        yield Shard(index, first, count, pieces)


def _record_in_memory(
    model: nn.Module, reader: Reader, shards: Iterator[Shard], tokenizer: Any, plan: dict[str, Any]
) -> Trace:
    parts, tables = [], []
    with reader:
        for shard in shards:
            parts.append(reader.read([piece.ids for piece in shard.pieces], shard.first_sequence))
            tables.append(_sequence_rows(shard))
    meta = _meta(model, plan)
    trace = from_parts(parts, pd.concat(tables), meta, range(len(moe_layers(model))))
    trace._vocabulary = vocabulary_of(tokenizer)
    return trace


def _record_to_disk(model: nn.Module, reader: Reader, writer: RunWriter, corpus: _Corpus, peers: Processes) -> None:
    tally, done, started = Tally(), writer.done, now()
    shards = shards_of(corpus.documents, corpus.tokenizer, corpus.limit, corpus.settings, tally)
    hidden = not (corpus.settings.progress and peers.leads)
    try:
        with reader, tqdm(total=corpus.documents.count, unit="doc", disable=hidden, desc="recording") as bar:
            for shard in shards:
                if shard.index % peers.world == peers.rank and shard.index not in done:
                    part = reader.read([piece.ids for piece in shard.pieces], shard.first_sequence)
                    table = store.write_sequences(_sequence_rows(shard))
                    rows = {f"sequences-{shard.index:05d}.parquet": table}
                    writer.commit_shard(shard.index, part.files(shard.index) | rows, convert.shard_counts(part))
                bar.update(shard.documents)
    except KeyboardInterrupt:
        print(
            f"\nStopped. {len(writer.done)} shards are complete in {writer.path}; the same call goes on from there.",
            file=sys.stderr,
        )
        raise
    peers.wait()
    if peers.leads:
        _finish(model, reader.signals, writer, corpus, {"started": started, **vars(tally)})


def _finish(model: nn.Module, signals: Signals, writer: RunWriter, corpus: _Corpus, reading: dict[str, Any]) -> None:
    records = writer.done
    counts = [{k: v for k, v in records[i].items() if k != "files"} for i in range(len(records))]
    tables = [writer.path / f"sequences-{index:05d}.parquet" for index in records]
    left_out = {name for name in ("router_logits", "logprob") if not getattr(signals, name)}
    left_out |= set() if signals.top_logprobs else set(store.NEXT_TOKEN)
    names = [n for n in (*store.TOKEN_COLUMNS, *store.ROUTING, *store.NEXT_TOKEN) if n not in left_out]
    meta = {
        **_meta(model, writer.plan),
        "reading": reading,
        "layers": list(range(len(moe_layers(model)))),
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
    if (vocabulary := vocabulary_of(corpus.tokenizer)) is not None:
        files["vocabulary.parquet"] = store.write_vocabulary(vocabulary)
    writer.finish(meta, files, drop=[table.name for table in tables])


def _join_tables(tables: list[Any], path: Any) -> None:
    schema = pa.unify_schemas([pq.read_schema(table) for table in tables], promote_options="permissive")
    with pq.ParquetWriter(path, schema, compression="zstd") as joined:
        for table in tables:
            joined.write_table(pq.read_table(table).cast(schema))


def _sequence_rows(shard: Shard) -> pd.DataFrame:
    rows = [{**piece.columns, "length": len(piece.ids)} for piece in shard.pieces]
    return pd.DataFrame(rows, index=pd.RangeIndex(shard.first_sequence, shard.first_sequence + len(rows)))


def _meta(model: nn.Module, plan: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": "record",
        "created": now(),
        "model": describe(model),
        "versions": versions(*PACKAGES),
        "settings": plan,
        "n_experts": n_experts(model),
        "top_k": top_k_of(model),
    }


def vocabulary_of(tokenizer: Any) -> pd.Series | None:
    """Raw pieces by token id, of a tokenizer that can tell them."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    pieces = pd.Series({index: piece for piece, index in tokenizer.get_vocab().items()}, name="piece")
    return pieces.sort_index()


def tokenizer_of(model: nn.Module) -> Any:
    try:
        return tokenizer_beside(model)
    except (OSError, ValueError) as error:
        name = getattr(model, "name_or_path", "") or "the model"
        raise BadInput(
            f"Documents were to be recorded with the tokenizer of {name}. None was found there. Pass "
            "tokenizer=AutoTokenizer.from_pretrained(...).",
            argument="tokenizer",
            value=name,
        ) from error


def _check(settings: Any) -> None:
    if not isinstance(settings, RecordSettings):
        raise BadInput(
            f"Documents were to be recorded. Their settings are a {type(settings).__name__}, not RecordSettings. Give "
            "settings=ml.RecordSettings(...).",
            argument="settings",
            value=type(settings).__name__,
        )


def batch_size(model: nn.Module, settings: RecordSettings) -> int:
    _check(settings)
    if settings.batch_tokens is not None:
        return _positive("batch_tokens", settings.batch_tokens)
    return 4096 if input_device(model).type == "cpu" else 16_384


def length_limit(model: nn.Module, settings: RecordSettings) -> int:
    _check(settings)
    if settings.overlong not in OVERLONG:
        raise BadInput(
            f"Documents were to be recorded with overlong={settings.overlong!r}. Choices are {', '.join(OVERLONG)}. "
            "Give one of them.",
            argument="overlong",
            value=settings.overlong,
        )
    _positive("shard_tokens", settings.shard_tokens)
    context = context_length(model)
    limit = context if settings.max_length is None else _positive("max_length", settings.max_length)
    if limit > context:
        raise BadInput(
            f"Sequences of {limit:,} tokens were to be recorded. The model's context is {context:,}. Give a smaller "
            "max_length.",
            argument="max_length",
            value=limit,
        )
    return limit


def _positive(name: str, value: int) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise BadInput(
            f"Documents were to be recorded with {name}={value}. It must be 1 or more. Give a larger one.",
            argument=name,
            value=value,
        )
    return value
