"""Columns of routing in external files, read in pieces, and the trace over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from mixlens.core.size_limits import check_parquet, check_safetensors, json_value
from mixlens.engines.check import FAULTS, Checker, Routers
from mixlens.errors import BadInput, SourceError
from mixlens.trace.arrays import column, layer_numbers
from mixlens.trace.shards import NEXT_TOKEN, ROUTING, TOKEN_COLUMNS, id_dtype
from mixlens.trace.trace import Trace, from_parts

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_OF_REQUESTS = ("missing_rows", "last_token", "padding", "stale_rows")
_PART = 1 << 20  # tokens per part of the trace
UNKNOWN = "unknown"


class Columns(Protocol):
    """Arrays with a common token axis that can be read in pieces."""

    n_tokens: int

    @property
    def names(self) -> frozenset[str]: ...
    def read(self, name: str, start: int, stop: int) -> np.ndarray: ...


class Arrays:
    """Columns from arrays in memory or memory-mapped files."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = dict(arrays)
        self.n_tokens = _length([array.shape for array in self.arrays.values()])
        self.names = frozenset(self.arrays)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.arrays[name][start:stop])


def _length(shapes: Sequence[Sequence[int]]) -> int:
    """Return the common length of the token axis. Raises SourceError if lengths differ."""
    lengths = {shape[0] if len(shape) else None for shape in shapes} or {0}
    if len(lengths) > 1 or None in lengths:
        raise _unfit(f"its arrays have the shapes {sorted(map(tuple, shapes))}", "tokens")
    return int(lengths.pop() or 0)


def piece(columns: Columns, name: str, start: int, stop: int) -> np.ndarray:
    """Read part of a column. Raises SourceError if its file cannot be read."""
    try:
        return columns.read(name, start, stop)
    except Exception as error:
        raise _unfit(f"its column {name} cannot be read ({str(error).strip()[:200]})", name) from error


class Safetensors:
    """Columns from the tensors of a safetensors file."""

    def __init__(self, path: str) -> None:
        check_safetensors(path)
        self._file = safe_open(path, framework="numpy")
        self.about: dict[str, str] = self._file.metadata() or {}
        self.names = frozenset(self._file.keys())
        self.n_tokens = _length([self._file.get_slice(name).get_shape() for name in self.names])

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._file.get_slice(name)[start:stop]


def parquet_file(path: str) -> pq.ParquetFile:
    """Open a Parquet file from a path or an fsspec URL."""
    file = fsspec.core.url_to_fs(path)[0].open(path)
    check_parquet(file)
    return pq.ParquetFile(file)


class Parquet:
    """Columns from Parquet files, concatenated in order; lists become the axes after the first.

    files    paths or fsspec URLs
    columns  {name here: name in the files}
    rows     number of rows per token, if files have one row for every layer and slot
    """

    def __init__(self, files: Sequence[str], columns: Mapping[str, str], *, rows: int = 1) -> None:
        self._columns, self._rows = dict(columns), rows
        self._files = [parquet_file(file) for file in files]
        groups = [(file, index) for file in self._files for index in range(file.num_row_groups)]
        sizes = [file.metadata.row_group(index).num_rows for file, index in groups]
        self._groups, self._ends = groups, np.cumsum(sizes, dtype=np.int64)
        self.n_tokens = int(self._ends[-1]) // rows if len(sizes) else 0
        self.names = frozenset(self._columns)
        self._kept: dict[str, tuple[int, np.ndarray]] = {}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        first, last = start * self._rows, stop * self._rows
        found = []
        for index in range(int(np.searchsorted(self._ends, first, side="right")), len(self._groups)):
            begin = int(self._ends[index - 1]) if index else 0
            if begin >= last:
                break
            found.append(self._group(name, index)[max(first - begin, 0) : last - begin])
        return np.concatenate(found) if found else self._group(name, 0)[:0]

    def _group(self, name: str, index: int) -> np.ndarray:
        """Read one row group of a column, caching the last one."""
        if self._kept.get(name, (-1, None))[0] != index:
            file, number = self._groups[index]
            column = file.read_row_group(number, columns=[self._columns[name]]).column(0).combine_chunks()
            self._kept[name] = (index, _array(column))
        return self._kept[name][1]


def _array(column: Any) -> np.ndarray:
    n, shape = len(column), []
    while any(is_list(column.type) for is_list in _LISTS):
        inner = column.flatten()
        if len(column) and len(inner) % len(column):
            raise _unfit("its lists are of different lengths", "parquet")
        shape.append(len(inner) // max(len(column), 1))
        column = inner
    return column.to_numpy(zero_copy_only=False).reshape(n, *shape)


class ColumnsPart:
    """A slice of columns as a part of a trace. `routing` holds the ids; each layer may have its own columns."""

    def __init__(
        self,
        routing: Sequence[Columns],
        tokens: Columns | None,
        place: tuple[int, int],
        sequence: np.ndarray,
        checker: Checker,
    ) -> None:
        self._routing, self._tokens, self._checker = routing, tokens, checker
        self._first, stop = place
        self.n_tokens = stop - self._first
        self._sequence = sequence
        self.first_sequence, self.last_sequence = int(sequence[0]), int(sequence[-1])
        self.sites: dict[str, tuple[int, ...]] = {}

    @cached_property
    def names(self) -> frozenset[str]:
        known = {*TOKEN_COLUMNS, *ROUTING, *NEXT_TOKEN}
        of_tokens = frozenset() if self._tokens is None else self._tokens.names
        return frozenset({*self._routing[0].names, *of_tokens, "sequence", "position", "phase"} & known)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        sequence = self._sequence[start:stop]
        if name == "sequence":
            return sequence.astype(np.int64)
        first, last = self._first + start, self._first + stop
        n, routers = stop - start, self._checker.routers
        if name in TOKEN_COLUMNS and self._tokens is not None and name in self._tokens.names:
            return column(name, piece(self._tokens, name, first, last), (n,))
        if name == "position":
            begins = np.searchsorted(self._sequence, self._sequence, side="left")
            return (np.arange(self.n_tokens) - begins)[start:stop]
        if name == "phase":
            return np.zeros(n, np.uint8)
        pieces = [piece(columns, name, first, last) for columns in self._routing]
        if name in NEXT_TOKEN:
            return column(name, pieces[0], (n, *pieces[0].shape[1:]))
        if len({one.shape for one in pieces}) > 1:
            raise _unfit(f"its layers have the shapes {sorted({one.shape for one in pieces})}", name)
        values = np.stack(pieces, axis=1) if len(pieces) > 1 or pieces[0].ndim == 2 else pieces[0]
        if name == "expert_id":
            return self._checker.check(values, prompt=n, generated=0)
        width = routers.n_experts if name == "router_logits" else routers.top_k
        return column(name, values, (n, len(routers.layers), width))

    def activation(self, site: str) -> tuple[np.ndarray, np.ndarray]:
        raise KeyError(site)


def trace_over(
    routing: Sequence[Columns],
    tokens: Columns | None,
    routers: Routers,
    about: Mapping[str, Any],
    *,
    tokens_a_sequence: int,
    document_id: Sequence[Any] | None = None,
) -> Trace:
    """Create a trace over columns without loading them.

    Parameters
    ----------
    routing : Sequence[Columns]
        expert_id, and weight or router_logits [token, layer, slot]; or [token, slot] for each layer.
    tokens : Columns, optional
        Columns of the token axis. "sequence" defines the sequences; without it they have a fixed length.
    routers : Routers
        Routers of the model.
    about : Mapping[str, Any]
        Metadata of the trace.
    tokens_a_sequence : int
        Tokens per sequence if sequences are unknown.
    document_id : Sequence[Any], optional
        Document of each sequence. If unknown, all tokens belong to one document, so no intervals are available; the
        sequences then have a column "window", for `cluster=`.
    """
    if not isinstance(tokens_a_sequence, int) or not 0 < tokens_a_sequence < 2**63:
        raise BadInput(
            f"Cannot cut a file into sequences of {tokens_a_sequence!r} tokens: expected an integer from 1. Pass one.",
            argument="tokens_a_sequence",
            value=tokens_a_sequence,
        )
    sizes = {columns.n_tokens for columns in (*routing, *([] if tokens is None else [tokens]))}
    if len(sizes) != 1 or 0 in sizes:
        raise _unfit(f"its columns have {sorted(sizes)} tokens", "tokens")
    n = sizes.pop()
    if tokens is not None and "sequence" in tokens.names:
        given = column("sequence", piece(tokens, "sequence", 0, n), (n,))
        sequence = np.cumsum(np.diff(given, prepend=given[:1]) != 0)
    else:
        sequence = np.arange(n) // tokens_a_sequence
    lengths = np.bincount(sequence)
    ends = np.cumsum(lengths)
    checker, parts, first = Checker(routers), [], 0
    while first < n:
        stop = int(ends[np.searchsorted(ends, min(first + _PART, n), side="left")])
        parts.append(ColumnsPart(routing, tokens, (first, stop), sequence[first:stop], checker))
        first = stop
    frame = pd.DataFrame({"length": lengths})
    if document_id is None:
        frame = frame.assign(document_id=UNKNOWN, window=np.arange(len(lengths)))
    elif len(document_id) == len(lengths):
        frame = frame.assign(document_id=list(document_id))
    else:
        raise _unfit(f"it names {len(document_id)} documents for {len(lengths)} sequences", "document_id")
    checked = {
        "requests": 1,
        "rows": n,
        "checked": [name for name in FAULTS if name not in _OF_REQUESTS],  # each block is checked when read
        "partly_checked": {"physical_ids": "ids that are permuted, and not beyond the experts, look like others"},
        "corrected": {},
    }
    meta = {"n_experts": routers.n_experts, "top_k": routers.top_k, "source_check": checked, **about}
    trace = from_parts(parts, frame, meta, list(routers.layers))
    first_block = next(trace.blocks("expert_id"))["expert_id"]  # refuse a file without valid routing early
    assert first_block.dtype == id_dtype(routers.n_experts)
    return trace


def known_routers(shape: Sequence[int], n_experts: Any, layers: Any) -> Routers:
    """Return the routers that a file and its reader define; `layers` are the numbers of the layers in the file."""
    if len(shape) != 3:
        raise _unfit(f"its ids have the shape {tuple(shape)}", "expert_id")
    if not isinstance(n_experts, int) or isinstance(n_experts, bool) or n_experts < 1:
        raise BadInput(
            "Cannot open these arrays as a trace: the number of experts per layer is unknown. Pass n_experts=.",
            argument="n_experts",
            value=n_experts,
        )
    numbers = layer_numbers(layers, shape[1]).tolist()
    return Routers(n_experts, int(shape[2]), tuple(numbers), len(numbers))


def listed(about: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a JSON value from the metadata of a file; None if it is missing."""
    try:
        found = json_value(about[name]) if name in about else None
    except (ValueError, TypeError, RecursionError) as error:
        raise _unfit(f"its metadata {name!r} is not JSON", name) from error
    if found is not None and not isinstance(found, kind):
        raise _unfit(f"its metadata {name!r} is a {type(found).__name__}, not a {kind.__name__}", name)
    return found


def _unfit(found: str, argument: str) -> SourceError:
    return SourceError(
        f"Cannot open the file as a trace: {found}. Pass a file whose columns belong to the same tokens.",
        argument=argument,
        value=found,
    )
