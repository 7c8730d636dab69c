"""documents: texts from files, folders, standard input, the Hub, or objects at hand, as one list."""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import io
import json
import lzma
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from mixlens.core.size_limits import MOST_CHARS, Oversized, bounded_lines, check_parquet, check_unpacked, json_value
from mixlens.errors import BadInput

STDIN = "-"
IDS = ("document_id", "id")
_JSON_LINES = (".jsonl", ".ndjson")
_JSON, _TABLES, _PACKED = (".json", *_JSON_LINES), (".csv", ".tsv", ".tab"), (".gz", ".bz2", ".xz", ".zst")
_HEADER = 65_536  # characters of a first line that are looked at
_PIECE = 1 << 20
_COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: _zstandard(file),
}
_NOT_TEXT = {
    b"%PDF": "a PDF file",
    b"PK\x03\x04": "a zip archive, as office documents and e-books are",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")  # as JSON writes numbers: 007 is text
_COLUMN = re.compile(r"\w[\w.-]*( [\w.-]+)*")  # unlike a line of prose with commas
_TRUTH = {"true": True, "True": True, "false": False, "False": False}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def documents(
    source: Any,
    *,
    text: str = "text",
    columns: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Read documents from a file, a folder, standard input, the Hub, or an object in memory.

    Files are recognised by their contents: JSON, JSON Lines, CSV, TSV, Parquet and Arrow give a document a row; any
    other text in UTF-8 is one document, with its path for an id. gzip, bzip2, xz and Zstandard are unpacked. In a CSV
    file a column is a number where all its values are numbers, and an empty cell is missing.

    Parameters
    ----------
    source : str, os.PathLike or Iterable
        Path of a file, or of a folder, whose files are read in order of their names; "-" for standard input; a data
        set of the Hub as "owner/name", or a folder that `datasets` saved; strings, mappings, a DataFrame, or a
        datasets.Dataset.
    text : str, optional
        Column that holds the text, or a chat as a list of messages with role and content; "messages" is taken where
        there is no column "text".
    columns : Sequence[str], optional
        Columns to keep beside the text and the id (document_id or id); None keeps all.
    split : str, optional
        Split of a data set that has several, as `datasets` writes it: "train", "train[:100]".
    limit : int, optional
        Read only the first documents; None reads all.

    Returns
    -------
    list[dict[str, Any]]
        One a document, its text under "text"; for `record` and the measurements of `ml.experiments`.

    Raises
    ------
    BadInput
        For a source that is not there or is not text, for a line or row that cannot be read, and for a column that is
        not there, each by name.

    Examples
    --------
    >>> _ = (tmp / "poems.csv").write_text("body,year\\nRoses are red,1784\\nThe fog comes,1916\\n")
    >>> ml.documents(tmp / "poems.csv", text="body", limit=1)
    [{'text': 'Roses are red', 'year': 1784}]
    """
    if isinstance(columns, str):
        columns = [columns]
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise BadInput(
            f"Cannot read {limit!r} documents: a limit is a whole number from 1. Pass one, or None for all.",
            argument="limit",
            value=limit,
        )
    name = str(source) if isinstance(source, str | os.PathLike) else f"the {type(source).__name__}"
    with _faults(name):
        rows = list(islice(_rows(source, text, split, limit), limit))
    if not rows:
        raise BadInput(
            f"Cannot read documents from {name}: it holds none. Pass a file or a folder with texts.",
            argument="source",
            value=name,
        )
    return [_document(row, f"document {number} of {name}", text, columns) for number, row in enumerate(rows)]


def _document(row: Any, name: str, text: str, columns: Sequence[str] | None) -> dict[str, Any]:
    """A row with its text under "text", and the columns that are kept."""
    given = dict(row) if isinstance(row, Mapping) else {text: row}
    held = text if text in given or text != "text" or "messages" not in given else "messages"
    if held not in given:
        texts = [str(column) for column, value in given.items() if isinstance(value, str | list)]
        raise BadInput(
            f"Cannot read {name}: it has no column {text!r}. {_one_of(text, given)} Name the column of the text by "
            f"text={next(iter(difflib.get_close_matches(text, texts, n=1) or texts), 'name')!r}.",
            argument="text",
            value=text,
        )
    kept = [column for column in given if column != held]
    if columns is not None:
        if missing := [column for column in columns if column not in given]:
            raise BadInput(
                f"Cannot read {name}: it has no column {missing[0]!r}. {_one_of(missing[0], given)}",
                argument="columns",
                value=missing[0],
            )
        kept = [column for column in kept if column in columns or column in IDS]
    if "text" in kept:
        raise BadInput(
            f"Cannot read {name}: its text is {held!r}, and it has another column called 'text'. Rename that one, or "
            "leave it out by columns=.",
            argument="columns",
            value="text",
        )
    return {"text": given[held], **{str(column): given[column] for column in kept}}


def _one_of(asked: str, given: Iterable[Any]) -> str:
    names = list(map(str, given))
    near = difflib.get_close_matches(asked, names, n=1)
    return f"Its columns are {', '.join(names)}{f'; did you mean {near[0]}?' if near else '.'}"


def _rows(source: Any, text: str, split: str | None, limit: int | None) -> Iterator[Any]:
    if isinstance(source, str) and source == STDIN:
        return _opened(io.BytesIO(sys.stdin.buffer.read()), "standard input", text, limit)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if path.is_dir():
            saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
            if saved:
                return _of_split(_saved(path), str(path), split)
            _refuse_split(split, str(path))
            return _folder(path, text, limit)
        if path.exists():
            _refuse_split(split, str(path))
            return _file(path, str(path), text, limit)
        if isinstance(source, str) and _HUB_NAME.fullmatch(source) and not _like_a_file(path):
            return _hub(source, split, limit)
        raise BadInput(
            f"Cannot read documents from {source}: no such file or folder. Pass an existing one, or a data set of the "
            "Hub as owner/name.",
            argument="source",
            value=str(source),
        )
    if isinstance(source, pd.DataFrame):
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    if isinstance(source, Mapping):
        return _of_split(source, f"the {type(source).__name__}", split)
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise BadInput(
            f"Cannot read documents from a {type(source).__name__}. Pass a path, strings, mappings, a DataFrame or a "
            "datasets.Dataset.",
            argument="source",
            value=type(source).__name__,
        )
    return iter(source)


def _like_a_file(path: Path) -> bool:
    known = (*_JSON, *_TABLES, *_PACKED, ".parquet", ".arrow", ".txt", ".md")
    return any(suffix.lower() in known for suffix in path.suffixes)


# ---------------------------------------------------------------------- files


def _folder(folder: Path, text: str, limit: int | None) -> Iterator[Any]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        inner = path.relative_to(folder)
        if not any(part.startswith(".") for part in inner.parts):
            with _faults(str(path)):
                yield from _file(path, inner.as_posix(), text, limit)


def _file(path: Path, name: str, text: str, limit: int | None) -> Iterator[Any]:
    with path.open("rb") as file:
        yield from _opened(file, name, text, limit)


def _opened(file: BinaryIO, name: str, text: str, limit: int | None) -> Iterator[Any]:
    """Rows of a file, recognised by its contents; a suffix decides where contents allow several readings."""
    suffix = next((end for end in reversed(Path(name.lower()).suffixes) if end not in _PACKED), "")
    if unpack := next((unpack for magic, unpack in _COMPRESSED.items() if _head(file).startswith(magic)), None):
        file = _Unpacked(file, unpack)
    head = _head(file)
    if what := next((what for magic, what in _NOT_TEXT.items() if head.startswith(magic)), None):
        raise BadInput(
            f"Cannot read documents from {name}: it is {what}. Convert it to plain text in UTF-8 first.",
            argument="source",
            value=name,
        )
    if head.startswith(b"PAR1"):
        if not isinstance(file, _Unpacked):  # which Parquet cannot be read from
            check_parquet(file)
        yield from _batches(pq.ParquetFile(file).iter_batches(1024))
        return
    if head.startswith(b"ARROW1"):
        arrow = ipc.open_file(file)
        yield from _batches(arrow.get_batch(number) for number in range(arrow.num_record_batches))
        return
    if head.startswith(b"\xff\xff\xff\xff"):
        yield from _batches(ipc.open_stream(file))
        return
    if b"\0" in head:
        raise BadInput(
            f"Cannot read documents from {name}: it is binary data, not text. Pass text in UTF-8, JSON, CSV, Parquet "
            "or Arrow.",
            argument="source",
            value=name,
        )
    with io.TextIOWrapper(file, "utf-8-sig") as lines:
        separator = _separator(lines.readline(_HEADER), suffix, text)
        lines.seek(0)
        if separator is not None:
            yield from _table(lines, separator, text, limit)
        else:
            yield from _json_or_prose(lines, name, text, suffix)


class _Unpacked(io.BufferedReader):
    """A compressed file as it unpacks. Raises ValueError for one that unpacks to more than any text does."""

    def __init__(self, packed: BinaryIO, unpack: Callable[[BinaryIO], Any]) -> None:
        self._packed = packed
        super().__init__(unpack(packed))

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(_PIECE), b""))
        return self._checked(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        return self._checked(super().read1(size))

    def _checked(self, piece: bytes) -> bytes:
        check_unpacked(self._packed.tell(), self.tell())
        return piece


def _zstandard(packed: BinaryIO) -> BinaryIO:
    data, pieces = io.BytesIO(packed.read()), io.BytesIO()  # the stream closes what it reads
    with pa.CompressedInputStream(pa.PythonFile(data, mode="r"), "zstd") as stream:
        while piece := stream.read(_PIECE):
            pieces.write(piece)
            check_unpacked(data.tell(), pieces.tell())
    pieces.seek(0)
    return pieces


def _head(file: BinaryIO) -> bytes:
    head = file.read(65_536)
    file.seek(0)
    return head


def _batches(batches: Iterable[pa.RecordBatch]) -> Iterator[Any]:
    for batch in batches:
        yield from batch.to_pylist()


def _separator(header: str, suffix: str, text: str) -> str | None:
    """What divides the columns of a table, which is named so or whose header names the text; None for no table."""
    header = header[:_HEADER]
    columns = {separator: next(csv.reader([header], delimiter=separator), []) for separator in ",;\t"}
    named = [
        separator
        for separator, names in columns.items()
        if len(names) > 1 and text in names and all(map(_COLUMN.fullmatch, names))
    ]
    if named:
        return named[0]
    if suffix == ".csv":
        return max(columns, key=lambda separator: len(columns[separator]))
    return "\t" if suffix in _TABLES else None


def _table(lines: Any, separator: str, text: str, limit: int | None) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
        frame = pd.read_csv(
            lines, sep=separator, dtype=str, keep_default_na=False, na_values=[""], index_col=False, nrows=limit
        )
    columns = {str(name): [None if value != value else value for value in frame[name]] for name in frame.columns}
    typed = {name: values if name == text else _typed(values) for name, values in columns.items()}
    return [dict(zip(typed, row, strict=True)) for row in zip(*typed.values(), strict=True)]


def _typed(values: list[str | None]) -> list[Any]:
    """Numbers or truth values where all are, else the text as it stands."""
    known = [value for value in values if value is not None]
    if all(_NUMBER.fullmatch(value) for value in known):
        return [None if value is None else json.loads(value) for value in values]
    if all(value in _TRUTH for value in known):
        return [None if value is None else _TRUTH[value] for value in values]
    return list(values)


def _json_or_prose(lines: io.TextIOWrapper, name: str, text: str, suffix: str) -> Iterator[Any]:
    """JSON Lines where the first line is a whole value and others follow, else one JSON value, else prose."""
    is_json = suffix in _JSON  # and what is not JSON is refused
    first, second, value = next((line for line in _beginning(lines) if line.strip()), ""), "", None
    if len(first) > MOST_CHARS and (suffix in _JSON_LINES or (is_json and first.lstrip()[:1] == "{")):
        raise _no_json(name, 1, Oversized(f"it is longer than {MOST_CHARS:,} characters"))
    if len(first) <= MOST_CHARS and (is_json or first.lstrip()[:1] in "[{"):
        value = _json(first)
        second = next((line for line in _beginning(lines) if line.strip()), "") if value is not None else ""
    lines.seek(0)
    if value is not None and second and (is_json or second.lstrip()[:1] in "[{"):
        yield from _json_lines(lines, name)
        return
    whole = lines.read()
    try:
        # A list of documents may be as large as they are.
        load = json.loads if whole.lstrip()[:1] == "[" else json_value
        found = _parsed(whole, load) if is_json or whole.lstrip()[:1] in ("[", "{") else None
    except (ValueError, RecursionError) as error:
        if is_json:
            raise _no_json(name, getattr(error, "lineno", 1), error) from error
        found = None
    if found is None:
        yield {"document_id": name, text: whole}
    elif isinstance(found, list):
        yield from found
    else:
        yield found


def _beginning(lines: io.TextIOWrapper) -> Iterator[str]:
    """Lines, of which too long ones come in pieces."""
    return iter(lambda: lines.readline(MOST_CHARS + 1), "")


def _json_lines(lines: io.TextIOWrapper, name: str) -> Iterator[Any]:
    number = 1
    try:
        for line in bounded_lines(lines):
            if line.strip():
                yield _parsed(line)
            number += 1
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise _no_json(name, number, error) from error


def _json(line: str) -> Any:
    try:
        return _parsed(line)
    except (ValueError, RecursionError):
        return None


def _parsed(text: str, load: Callable[..., Any] = json_value) -> Any:
    """A value of JSON. Raises ValueError also for NaN and Infinity, which are none, and for a half surrogate."""
    found = load(text, parse_constant=_refused)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number in JSON")


def _no_json(name: str, line: int, error: Exception) -> BadInput:
    why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return BadInput(
        f"Cannot read documents from {name}: line {line} is not JSON ({why}). Write one list of documents, or one JSON "
        "object a line.",
        argument="source",
        value=line,
    )


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """What a library says of a file it cannot read, as an error that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(
            f"Cannot read documents from {name}: it is not text in UTF-8 ({error.reason} at byte {error.start}). "
            "Convert it, as with iconv -f LATIN1 -t UTF-8.",
            argument="source",
            value=name,
        ) from error
    except (
        Oversized,
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        pa.ArrowException,
        pd.errors.ParserError,
    ) as error:
        raise BadInput(
            f"Cannot read documents from {name}: {str(error).strip()}. Repair the file, or pass another.",
            argument="source",
            value=name,
        ) from error
    except (pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        raise BadInput(
            f"Cannot read documents from {name}: {str(error).strip()}. Give every row as many cells as the header.",
            argument="source",
            value=name,
        ) from error


# ---------------------------------------------------------------------- datasets


def _hub(name: str, split: str | None, limit: int | None) -> Iterator[Any]:
    from datasets import load_dataset  # takes a second

    try:
        loaded = load_dataset(name, split=split, streaming=limit is not None)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"Cannot read the data set {name} from the Hub: {str(error).strip()[:300]}. Check its name and split; for "
            "one that needs more options, pass what datasets.load_dataset returns.",
            argument="source",
            value=name,
        ) from error
    return _of_split(loaded, name, split)


def _saved(path: Path) -> Any:
    from datasets import load_from_disk

    return load_from_disk(str(path))


def _refuse_split(split: str | None, name: str) -> None:
    if split is not None:
        raise BadInput(
            f"Cannot read the split {split!r} of {name}: only data sets have splits. Leave it out.",
            argument="split",
            value=split,
        )


def _of_split(found: Any, name: str, split: str | None) -> Iterator[Any]:
    """Rows of a data set; of several splits the one that is named."""
    if not isinstance(found, Mapping):
        return iter(found)
    names = list(found)
    chosen = names[0] if split is None and len(names) == 1 else split
    if chosen not in found:
        raise BadInput(
            f"Cannot read documents from {name}: its splits are {', '.join(map(str, names))}. Name one by split=.",
            argument="split",
            value=split,
        )
    return iter(found[chosen])
