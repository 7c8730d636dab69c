"""Counts per document, made in one pass over a trace.

Every statistic is a function of counts summed over documents. Because a pass keeps the counts of each document,
intervals can sum them again with other weights: one matrix product, without reading the trace twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mixlens.core.threads import ahead, cores, in_threads
from mixlens.stats.clusters import By, Clusters

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


@dataclass(frozen=True)
class Block:
    """Columns of a few whole sequences.

    columns   as returned by `Trace.blocks`, without "sequence"
    sequence  [token]
    clusters  rows of the totals, one for each distinct cluster in the block
    local     [token] index into `clusters`
    """

    columns: Mapping[str, np.ndarray]
    sequence: np.ndarray
    clusters: np.ndarray
    local: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def n_tokens(self) -> int:
        return len(self.local)

    def by_layer(self, name: str, layers: slice | list[int] = slice(None)) -> np.ndarray:
        """Return a column [token, layer, x] as a contiguous [layer, x, token], for sequential memory access."""
        return np.ascontiguousarray(self.columns[name][:, layers].transpose(1, 2, 0))

    def each_layer(
        self, name: str, add: Callable[[int, np.ndarray], None], layers: slice | list[int] = slice(None)
    ) -> None:
        """Call `add` with the index and the values [x, token] of every layer, on all cores: each in its own totals."""
        indices = np.arange(self.columns[name].shape[1])[layers]
        at_a_time = max(1, -(-len(indices) // cores()))

        def some(start: int) -> None:
            here = indices[start : start + at_a_time]
            # One after the other, so that the copies of all layers are not in memory at once.
            for part in np.array_split(here, -(-len(here) // 8)):
                for offset, values in enumerate(self.by_layer(name, part.tolist())):
                    add(start + int(part[0] - here[0]) + offset, values)

        in_threads(some, range(0, len(indices), at_a_time))

    def count(self, codes: np.ndarray, size: int, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Count each code 0 .. size-1 in each cluster [cluster, size]; codes [..., token of `where`]."""
        from scipy.sparse import coo_array  # imported here: takes a fifth of a second

        # A sparse matrix adds in compiled code that releases the GIL, unlike np.add.at.
        codes = codes.astype(np.int32, copy=False)
        rows = np.broadcast_to(self.local[where].astype(np.int32), codes.shape)
        ones = np.ones(codes.size, np.uint32)
        return coo_array((ones, (rows.ravel(), codes.ravel())), shape=(len(self.clusters), size)).toarray()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum numbers or booleans [..., token] within each cluster [cluster, ...]."""
        values = values.view(np.uint8) if values.dtype == bool else values
        starts = np.flatnonzero(np.diff(self.local, prepend=-1))
        of_run = np.add.reduceat(values, starts, axis=-1, dtype=np.float64)
        out = np.zeros((len(self.clusters), *values.shape[:-1]))
        np.add.at(out, self.local[starts], np.moveaxis(of_run, -1, 0))
        return out

    def follows(self) -> np.ndarray:
        """Mask [token] of tokens directly after the previous one in the same sequence; needs "position"."""
        out = np.zeros(self.n_tokens, bool)
        out[1:] = (np.diff(self.sequence) == 0) & (np.diff(self["position"]) == 1)
        return out


@dataclass(frozen=True)
class Reading:
    """Columns of a trace that a pass reads, and the approximate number of tokens per block."""

    names: tuple[str, ...]
    tokens: int = 65_536


@dataclass(frozen=True)
class Counts:
    """Counts of every cluster, each [cluster, layer, ...], and tokens [cluster]."""

    clusters: Clusters
    totals: dict[str, np.ndarray]
    tokens: np.ndarray
    n_documents: np.ndarray
    layers: np.ndarray


@dataclass(frozen=True)
class Counting:
    """Specification of counts: `add` adds each block to totals of these shapes, which start at 0."""

    clusters: Clusters
    shapes: Mapping[str, tuple[int, ...]]
    add: Callable[[Block, dict[str, np.ndarray]], None]
    dtype: type[np.generic] = np.float64

    def finished(self, trace: Trace, counted: Counted) -> Counts:
        clusters = self.clusters
        of_document = np.zeros(int(clusters.document.max(initial=-1)) + 1)
        of_document[counted.documents] = 1
        numbers = np.flatnonzero(clusters.document >= 0)
        group_of_document = np.zeros(len(of_document), np.int64)
        group_of_document[clusters.document[numbers]] = clusters.group[clusters.of_sequence[numbers]]
        seen = reduced(trace, of_document) > 0
        n_documents = np.bincount(group_of_document[seen], minlength=clusters.n_groups)
        totals = {name: reduced(trace, array) for name, array in counted.totals.items()}
        return Counts(clusters, totals, reduced(trace, counted.tokens), n_documents, trace.layers)


class Counted:
    """Counts of some clusters, filled block by block.

    present    numbers of the clusters [row]
    totals     [row, ...]
    tokens     [row]
    documents  numbers of documents with at least one token
    """

    def __init__(self, counting: Counting, present: np.ndarray) -> None:
        self.present = present
        self.totals = {name: np.zeros((len(present), *s), counting.dtype) for name, s in counting.shapes.items()}
        self.tokens = np.zeros(len(present))
        self.documents = np.empty(0, np.int64)

    def feed(self, counting: Counting, columns: Mapping[str, np.ndarray]) -> None:
        columns = dict(columns)
        sequence = columns.pop("sequence")
        if len(sequence) == 0:
            return
        found, local = np.unique(counting.clusters.of_sequence[sequence], return_inverse=True)
        rows = np.searchsorted(self.present, found)
        self.tokens[rows] += np.bincount(local)
        self.documents = np.union1d(self.documents, counting.clusters.document[sequence])
        counting.add(Block(columns, sequence, rows, local), self.totals)

    def merge(self, other: Counted) -> None:
        """Add counts of a subset of the clusters."""
        rows = np.searchsorted(self.present, other.present)
        for name, total in self.totals.items():
            total[rows] = np.add(total[rows], other.totals[name])
        self.tokens[rows] += other.tokens
        self.documents = np.union1d(self.documents, other.documents)


Countings = Sequence[tuple[Counting, Reading]]


def count(
    trace: Trace,
    by: By | Clusters,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Reading | Iterable[dict[str, np.ndarray]],
    add: Callable[[Block, dict[str, np.ndarray]], None],
    *,
    dtype: type[np.generic] = np.float64,
) -> Counts:
    """Read columns of the trace once, or iterate over `blocks`; `add` adds each block to the totals.

    blocks  have the column "sequence", as reading does
    by      sequence columns to group by, or the clusters themselves
    shapes  {name: shape without the cluster}, of totals that start at 0
    dtype   of the totals; integer if only integers are added
    """
    clusters = by if isinstance(by, Clusters) else Clusters.of(trace, by, shapes)
    counting = Counting(clusters, shapes, add, dtype)
    if isinstance(blocks, Reading):
        if (shared := _shared.get()) is not None and not shared.used:
            return shared.counts_of(trace, counting, blocks)
        (counted,) = one_pass(trace, [(counting, blocks)])
    else:
        counted = Counted(counting, np.arange(len(clusters.group)))
        for columns in ahead(blocks):
            counted.feed(counting, columns)
    return counting.finished(trace, counted)


def one_pass(trace: Trace, countings: Countings) -> list[Counted]:
    """Count several statistics in one pass over the trace.

    Floats are added shard by shard, in order, so that the result does not depend on the workers; integers are added
    directly.
    """
    whole = [Counted(counting, np.arange(len(counting.clusters.group))) for counting, _ in countings]
    parts = trace.parts()
    if trace.executor is not None:
        for counted in _counted_by(trace.executor, countings, parts):
            _merge(counted, whole)
        return whole
    direct = [len(parts) == 1 or np.issubdtype(counting.dtype, np.integer) for counting, _ in countings]
    for part in parts:
        counted = [w if d else _nothing(c, part) for w, d, (c, _) in zip(whole, direct, countings, strict=True)]
        _feed(part, countings, counted)
        _merge(counted, whole)
    return whole


def _counted_by(executor: str, countings: Countings, parts: Sequence[Trace]) -> Iterator[list[Counted]]:
    """Yield the counts of each part, in order, using a joblib backend."""
    import joblib

    with joblib.parallel_config(backend=executor):
        parallel: Any = joblib.Parallel(n_jobs=-1, return_as="generator")
        yield from parallel(joblib.delayed(_counted)(countings, part) for part in parts)


def _counted(countings: Countings, part: Trace) -> list[Counted]:
    counted = [_nothing(counting, part) for counting, _ in countings]
    _feed(part, countings, counted)
    return counted


def _nothing(counting: Counting, part: Trace) -> Counted:
    return Counted(counting, np.unique(counting.clusters.of_sequence[part.sequences.index]))


def _merge(parts: Sequence[Counted], whole: Sequence[Counted]) -> None:
    for total, part in zip(whole, parts, strict=True):
        if part is not total:
            total.merge(part)


def _feed(part: Trace, countings: Countings, counted: Sequence[Counted]) -> None:
    """Add the tokens of a part of the trace to the counts."""
    names = list(dict.fromkeys(name for _, reading in countings for name in reading.names))
    tokens = min(reading.tokens for _, reading in countings)
    for columns in ahead(part.blocks(*names, tokens=tokens)):

        def feed(one: tuple[tuple[Counting, Reading], Counted], columns: dict[str, np.ndarray] = columns) -> None:
            (counting, reading), into = one
            into.feed(counting, {name: columns[name] for name in reading.names})

        in_threads(feed, zip(countings, counted, strict=True))


class _Postponed(Exception):
    """Raised when a statistic has declared its counts and waits for the shared pass."""


@dataclass
class _Shared:
    """State of a statistic in a shared pass: called once to learn its counts, and again to compute with them.

    used  True once the counts were used; further counts make passes of their own
    """

    counting: Counting | None = None
    reading: Reading | None = None
    counted: Counted | None = None
    used: bool = False

    def counts_of(self, trace: Trace, counting: Counting, reading: Reading) -> Counts:
        if self.counted is None:
            self.counting, self.reading = counting, reading
            raise _Postponed
        counted, self.counted, self.used = self.counted, None, True
        return counting.finished(trace, counted)


_shared: ContextVar[_Shared | None] = ContextVar("shared", default=None)


def in_one_pass(trace: Trace, computing: Mapping[str, Callable[[], xr.Dataset]]) -> dict[str, xr.Dataset]:
    """Evaluate functions of a trace, with all their counts made in one pass.

    A function that needs several passes computes on its own.
    """
    found: dict[str, xr.Dataset] = {}
    waiting: dict[str, _Shared] = {}
    for name, compute in computing.items():
        shared = _Shared()
        token = _shared.set(shared)
        try:
            found[name] = compute()
        except _Postponed:
            waiting[name] = shared
        finally:
            _shared.reset(token)
    countings = [(s.counting, s.reading) for s in waiting.values() if s.counting is not None and s.reading is not None]
    if countings:
        for shared, counted in zip(waiting.values(), one_pass(trace, countings), strict=True):
            shared.counted = counted
    for name, shared in waiting.items():
        token = _shared.set(shared)
        try:
            found[name] = computing[name]()
        finally:
            _shared.reset(token)
    return {name: found[name] for name in computing}


def add_choices(block: Block, chosen: np.ndarray, slots: int | None = None) -> None:
    """Add the number of choices of each expert, in the first `slots` or any, to [cluster, layer, expert]."""

    def add(layer: int, ids: np.ndarray) -> None:
        chosen[block.clusters, layer] += block.count(ids[:slots], chosen.shape[-1])

    block.each_layer("expert_id", add)


def reduced(trace: Trace, array: np.ndarray) -> np.ndarray:
    """Sum an array over the processes that share the trace; no-op for one process."""
    if trace.reduce is None:
        return array
    return trace.reduce(array.astype(np.int64) if array.dtype.kind == "u" else array)
