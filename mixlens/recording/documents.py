"""From what a caller has (strings, dicts, a datasets.Dataset) to documents, token ids and shards."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixlens.core.names import beside
from mixlens.errors import BadInput
from mixlens.recording.chats import is_chat

OVERLONG = ("error", "truncate", "split")
_SCALARS = (str, bool, int, float, bytes, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)
_OWN = ("sequence", "length")  # columns that a trace has beside the caller's
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A text, or a chat as a list of messages, with the caller's columns."""

    number: int
    id: Any
    text: Any
    columns: dict[str, Any]

    @property
    def name(self) -> str:
        return f"document {self.number} (id {self.id!r})"


@dataclass(frozen=True)
class Piece:
    """Token ids of one sequence, the columns of its row, and the phase of each token; None where all are prompt."""

    ids: np.ndarray
    columns: dict[str, Any]
    phase: np.ndarray | None = None


class Documents:
    """The caller's documents, checked once; can be gone through again and again.

    documents  strings, mappings with a text column and any others, a datasets.Dataset; or checked ones
    column     name of the text column; "messages" is taken where there is no column "text"

    `digest` is the SHA-256 of all texts and columns. Raises BadInput for no documents, for one that is neither text nor
    a chat or is empty, for a missing column, and for ids that occur twice. Warns of a column that gives way to one of
    the trace's own.
    """

    def __init__(self, documents: Iterable[Any], column: str) -> None:
        if isinstance(documents, Documents):
            self.__dict__.update(documents.__dict__)
            return
        if isinstance(documents, str | Mapping):
            raise BadInput(
                f"Cannot record a single {type(documents).__name__}. Pass a list of documents, one split of a "
                "dataset, or ml.documents(path) for a file.",
                argument="documents",
                value=type(documents).__name__,
            )
        if not isinstance(documents, Iterable) and not hasattr(documents, "__getitem__"):
            raise BadInput(
                f"Cannot record a {type(documents).__name__}. Pass strings, mappings with a text column, or a "
                "datasets.Dataset.",
                argument="documents",
                value=type(documents).__name__,
            )
        if isinstance(documents, pd.DataFrame):
            documents = documents.to_dict("records")
        self.column = column
        self._documents = documents if hasattr(documents, "__getitem__") else list(documents)
        self.digest, self.count = self._check()

    @property
    def columns(self) -> list[str]:
        """Names of the caller's columns, beside text and id."""
        return list(next(iter(self)).columns)

    def __iter__(self) -> Iterator[Document]:
        for number, raw in enumerate(self._documents):
            columns = dict(raw) if isinstance(raw, Mapping) else {self.column: raw}
            if self.column == "text" and "text" not in columns and "messages" in columns:
                columns["text"] = columns.pop("messages")
            if self.column not in columns:
                raise BadInput(
                    f"Cannot record document {number}: it has the columns {', '.join(map(str, columns))} and none "
                    f"called {self.column!r}. Name the text column: settings=RecordSettings(text=...).",
                    argument=self.column,
                    value=number,
                )
            text = columns.pop(self.column)
            if not ((isinstance(text, str) and text) or is_chat(text)):
                empty = text is None or text in ("", [])
                found = "an empty text" if empty else f"{type(text).__name__}, neither text nor messages with roles"
                raise BadInput(
                    f"Cannot record document {number}: it is {found}. Leave it out, or pass a string.",
                    argument=self.column,
                    value=number,
                )
            for name, value in {self.column: text, **columns}.items():
                if isinstance(value, str) and (half := _HALF_OF_A_PAIR.search(value)):
                    raise BadInput(
                        f"Cannot record document {number}: character {half.start()} of its {name} is half of a "
                        'surrogate pair, which is not text. Repair it, as with .encode("utf-8", "replace").decode(), '
                        "or leave the document out.",
                        argument=name,
                        value=number,
                    )
            own = next((columns.pop(name) for name in ("document_id", "id") if name in columns), number)
            columns = {beside(str(key), _OWN): _plain(value) for key, value in columns.items()}
            yield Document(number, _plain(own), text, columns)

    def _check(self) -> tuple[str, int]:
        digest, seen, first, count = hashlib.sha256(), set(), None, 0
        kinds: dict[str, str] = {}
        for document in self:
            first = document.columns.keys() if first is None else first
            if document.columns.keys() != first:
                odd = sorted(document.columns.keys() ^ first)
                raise BadInput(
                    f"Cannot record document {document.number}: it differs from document 0 in the columns "
                    f"{', '.join(odd)}. Give every document the same columns.",
                    argument=odd[0],
                    value=document.number,
                )
            if document.id in seen:
                raise BadInput(
                    f"Cannot record document {document.number}: its id {document.id!r} occurred before. Give every "
                    "document its own id, or none.",
                    argument="id",
                    value=document.id,
                )
            seen.add(document.id)
            for name, value in {"id": document.id, **document.columns}.items():
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    raise BadInput(
                        f"Cannot record document {document.number}: its column {name!r} holds a whole number of more "
                        "than 64 bits, which tables do not hold exactly. Pass it as text.",
                        argument=name,
                        value=document.number,
                    )
                if value is not None and kinds.setdefault(name, kind := _kind(value)) != kind:
                    raise BadInput(
                        f"Cannot record document {document.number}: its column {name!r} holds a {kind}, where earlier "
                        f"documents have a {kinds[name]}. Give every column values of one type.",
                        argument=name,
                        value=document.number,
                    )
            digest.update(json.dumps([document.id, document.text, document.columns], default=str).encode())
            count += 1
        if renamed := [name for name in _OWN if beside(name, _OWN) in (first or ())]:
            warnings.warn(
                f"The column {' and '.join(renamed)} of the documents is kept as "
                f"{' and '.join(beside(name, _OWN) for name in renamed)}: a trace has a {renamed[0]} of its own.",
                stacklevel=2,
            )
        if not count:
            raise BadInput(
                "Cannot record: there are no documents. Pass at least one text.",
                argument="documents",
                value=0,
            )
        return digest.hexdigest(), count


@dataclass
class Tally:
    """What reading the documents did to them."""

    truncated_documents: int = 0
    truncated_tokens: int = 0
    split_documents: int = 0


def pieces_of(
    document: Document, ids: list[int], phase: np.ndarray | None, max_length: int, overlong: str, tally: Tally
) -> list[Piece]:
    """The sequences of one document; a longer one than `max_length` is an error, truncated, or cut in pieces.

    Raises BadInput for a document without tokens, and for a long one when `overlong` is "error".
    """
    if not ids:
        raise BadInput(
            f"Cannot record {document.name}: its text has no tokens. Leave it out, or pass another text.",
            argument="text",
            value=document.number,
        )
    if len(ids) > max_length:
        if overlong == "error":
            raise BadInput(
                f"Cannot record {document.name}: it has {len(ids):,} tokens, and the limit is {max_length:,}. Pass "
                'settings=RecordSettings(overlong="truncate") or "split" (--overlong on the command line).',
                argument="overlong",
                value=len(ids),
            )
        if overlong == "truncate":
            tally.truncated_documents += 1
            tally.truncated_tokens += len(ids) - max_length
            ids = ids[:max_length]
        else:
            tally.split_documents += 1
    array = np.asarray(ids, np.int64)
    cuts = range(0, len(array), max_length)
    columns = {"document_id": document.id, **document.columns}
    return [
        Piece(array[i : i + max_length], columns, None if phase is None else phase[i : min(i + max_length, len(array))])
        for i in cuts
    ]


def table_of(rows: Sequence[Mapping[str, Any]], index: pd.Index | None = None) -> pd.DataFrame:
    """The rows as a table; whole numbers beside a None stay whole, where pandas alone would make them floats."""
    table = pd.DataFrame(list(rows), index=index)
    for name in table.columns:
        values = [row[name] for row in rows]
        held = [value for value in values if value is not None]
        if 0 < len(held) < len(values) and all(
            isinstance(value, int) and not isinstance(value, bool) for value in held
        ):
            table[name] = pd.array(values, dtype="Int64")
    return table


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "truth value", int: "number", float: "number"}
    return kinds.get(type(value), type(value).__name__)


def _plain(value: Any) -> Any:
    """A column value as Parquet can hold it: scalars of numpy and torch as Python's, nested values as JSON text."""
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, np.datetime64 | np.timedelta64) or value is pd.NaT:
        value = pd.Timestamp(value) if isinstance(value, np.datetime64) else pd.Timedelta(value)
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is pd.NA or value is pd.NaT:
        return None
    if value is None or isinstance(value, _SCALARS):
        return value
    return json.dumps(value, default=str)
