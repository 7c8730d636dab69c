"""Documents through a model shard by shard: in memory, or as a run that resumes, in one process or several."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as safetensors_bytes
from torch import nn
from tqdm import tqdm

from mixlens.core.distributed import processes
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.errors import BadInput, visible
from mixlens.interventions.hooks import about_choices, edits_of
from mixlens.models.hub import tokenizer_beside
from mixlens.models.layout import config_of, context_length, input_device, is_sharded, moe_layers, n_experts
from mixlens.models.provenance import describe, identity, tokenizer_sha256
from mixlens.recording.chats import read_chat
from mixlens.recording.documents import OVERLONG, Document, Documents, Piece, Tally, pieces_of, table_of
from mixlens.recording.recorder import PACKAGES
from mixlens.stats.measured import VOCABULARY, Measured, read_measured
from mixlens.trace import shards as store

_DESCRIPTIONS = {"trace": "recording"}  # of progress bars, where they differ from the kind of run


@dataclass(frozen=True)
class RecordSettings:
    """Settings of how documents are read.

    Parameters
    ----------
    text : str, optional
        Name of the text column.
    max_length : int, optional
        Tokens a sequence; None for the model's context.
    overlong : str, optional
        What happens to a longer document: "error", "truncate" (counted), or "split" into sequences.
    batch_tokens : int, optional
        Tokens a forward, padding included; None for 4,096 on a CPU and 16,384 on an accelerator. A longer
        sequence is read alone, in chunks of this size, with a key-value cache.
    shard_tokens : int, optional
        Tokens after which a shard is closed; a killed run loses at most the open shard.
    progress : bool, optional
        Whether to show a progress bar.

    Examples
    --------
    >>> ml.RecordSettings(max_length=128, overlong="truncate").max_length
    128
    """

    text: str = "text"
    max_length: int | None = None
    overlong: str = "error"
    batch_tokens: int | None = None
    shard_tokens: int = 65_536
    progress: bool = True


@dataclass(frozen=True)
class Shard:
    index: int
    first_sequence: int
    documents: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Corpus:
    """Documents, and how a model reads them: fixed slices, whoever computes them."""

    documents: Documents
    tokenizer: Any
    vocabulary_size: int
    limit: int
    batch_tokens: int
    settings: RecordSettings
    begin: int | None = None  # the id of the model that begins a text, where the tokenizer has it too
    tally: Tally = field(default_factory=Tally)

    @staticmethod
    def of(model: nn.Module, documents: Iterable[Any], tokenizer: Any, settings: RecordSettings) -> Corpus:
        """Raises BadInput for documents that cannot be read as the settings say."""
        batch_tokens = batch_size(model, settings)
        tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        checked = Documents(documents, settings.text)
        config = config_of(model)
        own = getattr(tokenizer, "bos_token_id", None)
        begin = own if own is not None and own == getattr(config, "bos_token_id", None) else None
        limit = length_limit(model, settings)
        return Corpus(checked, tokenizer, int(config.vocab_size), limit, batch_tokens, settings, begin)

    def shards(self) -> Iterator[Shard]:
        """Slices of the documents; a shard closes with the document that fills it."""
        index, first, tokens, count, pieces = 0, 0, 0, 0, []
        for document in self.documents:
            ids, phase = self._ids(document)
            if document.number == 0 and self.begin is not None and ids[:1] != [self.begin]:
                warnings.warn(
                    f"The documents are read without {self.tokenizer.bos_token} at their beginning, with which the "
                    "model was trained: the tokenizer does not add it. Routing of the first tokens will differ.",
                    stacklevel=2,
                )
            pieces += (new := pieces_of(document, ids, phase, self.limit, self.settings.overlong, self.tally))
            tokens, count = tokens + sum(len(piece.ids) for piece in new), count + 1
            if tokens >= self.settings.shard_tokens:
                yield Shard(index, first, count, pieces)
                index, first, tokens, count, pieces = index + 1, first + len(pieces), 0, 0, []
        if pieces:
            yield Shard(index, first, count, pieces)

    def _ids(self, document: Document) -> tuple[list[int], np.ndarray | None]:
        """Token ids of a document, and their phases where it is a chat.

        Raises BadInput for ids beyond the model's, and for two BOS tokens at the start.
        """
        name = document.name
        if isinstance(document.text, str):
            ids, phase = self.tokenizer(document.text)["input_ids"], None
        else:
            ids, phase = read_chat(document.text, self.tokenizer, name)
        if ids and max(ids) >= self.vocabulary_size:
            raise BadInput(
                f"Cannot record {name}: the tokenizer gives token {max(ids)}, and the model has "
                f"{self.vocabulary_size:,}. Pass the model's own tokenizer=.",
                argument="tokenizer",
                value=max(ids),
            )
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is not None and ids[:2] == [bos, bos]:
            begins = self.tokenizer.bos_token
            raise BadInput(
                f"Cannot record {name}: it begins with two {begins}, one of its text, as a chat template writes it, "
                f"and one that the tokenizer adds. Remove {begins} from the text.",
                argument="text",
                value=document.number,
            )
        return ids, phase

    def progress(self, description: str, *, leads: bool = True) -> Iterator[Shard]:
        """The shards, under a progress bar over documents in the process that leads."""
        hidden = not (self.settings.progress and leads)
        with tqdm(total=self.documents.count, unit="doc", disable=hidden, desc=description) as bar:
            for shard in self.shards():
                yield shard
                bar.update(shard.documents)

    def vocabulary(self) -> pd.Series | None:
        """Raw pieces by token id, where the tokenizer can tell them."""
        return vocabulary_of(self.tokenizer)

    def plan(self) -> dict[str, Any]:
        """The settings that decide what is recorded, and a hash of the documents."""
        return {
            "input_sha256": self.documents.digest,
            "documents": self.documents.count,
            "tokenizer": str(getattr(self.tokenizer, "name_or_path", "")),
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "max_length": self.limit,
            "overlong": self.settings.overlong,
            "batch_tokens": self.batch_tokens,
            "shard_tokens": self.settings.shard_tokens,
        }


def run_shards(
    out: str | os.PathLike[str],
    kind: str,
    plan: dict[str, Any],
    corpus: Corpus,
    compute: Callable[[Shard], Any],
    write: Callable[[RunWriter, Shard, Any], None],
    finish: Callable[[RunWriter], None],
    *,
    together: bool = False,
) -> None:
    """Compute every shard of a corpus into a run directory. A run that was stopped resumes; a complete one is left.

    Under `accelerate launch` every process commits its share of the shards, and the one that leads finishes the run.

    together  whether every process must take part in every shard, as where a model is sharded over them; the one that
              leads writes

    Raises RunError when `out` holds something else or cannot be written.
    """
    peers = processes()
    if not peers.leads:
        peers.wait()
    with RunWriter(out, kind, plan, leader=peers.leads) as writer:
        if peers.leads:
            peers.wait()
        if not writer.complete:
            try:
                for shard in corpus.progress(_DESCRIPTIONS.get(kind, kind), leads=peers.leads):
                    mine = together or shard.index % peers.world == peers.rank
                    if not mine or writer.has(shard.index):
                        continue
                    found = compute(shard)
                    if peers.leads or not together:
                        write(writer, shard, found)
            except KeyboardInterrupt:
                told = f"{len(writer.done)} shards are complete in {writer.path}; the same call resumes from there."
                print(f"\nStopped. {visible(told)}", file=sys.stderr)
                raise
            peers.wait()
            if peers.leads:
                finish(writer)
        peers.wait()


def measure_documents(
    model: nn.Module,
    corpus: Corpus,
    kind: str,
    *,
    measure: Callable[[Shard], dict[str, np.ndarray]],
    about: Mapping[str, Any],
    out: str | os.PathLike[str] | None,
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
        "layers": [layer.index for layer in moe_layers(model)],
        **about_choices(model),
        **about,
    }
    pieces = corpus.vocabulary() if vocabulary else None
    if out is None:
        parts = [(measure(shard), documents_of(shard)) for shard in corpus.progress(kind)]
        joined = {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in parts[0][0]}
        tables = pd.concat([table for _, table in parts], ignore_index=True)
        tables = tables.astype(object).where(tables.notna(), None)
        return Measured(joined, tables, meta, pieces)
    plan = {
        **corpus.plan(),
        "model": identity(model, meta["model"]),
        **about,
        **({"edits": edits} if (edits := edits_of(model)) else {}),
    }
    run_shards(
        out,
        kind,
        plan,
        corpus,
        measure,
        _commit,
        lambda writer: _finish(writer, {**meta, "model": meta["model"] | plan["model"]}, pieces),
        together=is_sharded(model),
    )
    return read_measured(out, kind)


def documents_of(shard: Shard) -> pd.DataFrame:
    """One row a document of a shard, with the caller's columns."""
    table = table_of([piece.columns for piece in shard.pieces])
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


def _commit(writer: RunWriter, shard: Shard, arrays: dict[str, np.ndarray]) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    rows = pa.Table.from_pandas(documents_of(shard), preserve_index=False)
    writer.commit_shard(
        shard.index,
        {f"{writer.kind}-{shard.index:05d}.safetensors": safetensors_bytes(arrays)},
        {"documents": shard.documents, "tokens": int(lengths_of(shard).sum())},
        interim={f"documents-{shard.index:05d}.parquet": store.parquet_bytes(rows)},
    )


def _finish(writer: RunWriter, meta: dict[str, Any], vocabulary: pd.Series | None) -> None:
    done = writer.done
    tables = [pq.read_table(writer.work / f"documents-{index:05d}.parquet") for index in done]
    joined = pa.concat_tables(tables, promote_options="permissive")
    files = {"documents.parquet": store.parquet_bytes(joined)}
    if vocabulary is not None:
        files[VOCABULARY] = store.vocabulary_bytes(vocabulary)
    counts = {name: sum(record[name] for record in done.values()) for name in ("documents", "tokens")}
    writer.finish({**meta, "counts": counts}, files)


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
            f"Cannot find a tokenizer for {name}. Pass tokenizer=AutoTokenizer.from_pretrained(...).",
            argument="tokenizer",
            value=name,
        ) from error


def _check(settings: Any) -> None:
    if not isinstance(settings, RecordSettings):
        raise BadInput(
            f"Cannot record with settings of type {type(settings).__name__}: expected RecordSettings. Pass "
            "settings=ml.RecordSettings(...).",
            argument="settings",
            value=type(settings).__name__,
        )


def batch_size(model: nn.Module, settings: RecordSettings) -> int:
    _check(settings)
    if settings.batch_tokens is not None:
        return _positive("batch_tokens", settings.batch_tokens)
    return default_batch_tokens(on_cpu=input_device(model).type == "cpu")


def default_batch_tokens(*, on_cpu: bool) -> int:
    return 4096 if on_cpu else 16_384


def length_limit(model: nn.Module, settings: RecordSettings) -> int:
    _check(settings)
    if settings.overlong not in OVERLONG:
        raise BadInput(
            f"Cannot record with overlong={settings.overlong!r}: choices are {', '.join(OVERLONG)}. Pass one of them.",
            argument="overlong",
            value=settings.overlong,
        )
    _positive("shard_tokens", settings.shard_tokens)
    context = context_length(model)
    limit = context if settings.max_length is None else _positive("max_length", settings.max_length)
    if limit > context:
        raise BadInput(
            f"Cannot record sequences of {limit:,} tokens: the context of the model is {context:,}. Pass a smaller "
            "max_length.",
            argument="max_length",
            value=limit,
        )
    return limit


def _positive(name: str, value: int) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise BadInput(
            f"Cannot record with {name}={value}: it must be 1 or more. Pass a larger number.",
            argument=name,
            value=value,
        )
    return value
