"""One pass over a trace: counts of every document, and the Dataset with intervals that is made from them.

Every statistic is a function of counts that are summed over documents. A pass keeps the counts of each document, so
that the bootstrap can sum them again with other weights: one matrix product, and the trace is never read twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Quantity, effective_number, leaving_out, said, with_bounds
from mixlens.core.names import OF_STATISTICS, beside
from mixlens.core.threads import cores, in_threads
from mixlens.errors import BadInput, MissingSignal
from mixlens.stats.multiplicity import p_against, with_survivors

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

By = str | Sequence[str] | None
Statistic = Callable[[dict[str, np.ndarray]], Mapping[str, Quantity] | Quantity]

# Counts kept (128 MB), documents or bundles of documents a group, and numbers evaluated at a time (2 MB).
_MOST_AT_A_TIME = 2**27  # counts that a statistic of pairs of experts holds (512 MB)
_MOST_COUNTS, _FEWEST_BUNDLES, _MOST_BUNDLES = 2**24, 50, 512
_MOST_VALUES = 2**18

JIANG = "Jiang et al. 2024, Mixtral of Experts, arXiv 2401.04088"
OLMOE = "Muennighoff et al. 2024, OLMoE, arXiv 2409.02060"


@dataclass(frozen=True)
class Clusters:
    """What the bootstrap draws: the documents of each group.

    by           {sequence column, beside the names of statistics: its labels}, the dimensions of the groups
    of_sequence  [sequence number] cluster of each sequence
    group        [cluster] group, counted over the product of the labels
    document     [sequence number] document within its group, for counting documents

    A cluster is a document. Where there are more documents than counts fit in memory, or more than 512 a group,
    documents are put together at random into bundles of equal number; bundles are as independent as documents are.
    """

    by: Mapping[str, np.ndarray]
    of_sequence: np.ndarray
    group: np.ndarray
    document: np.ndarray

    @classmethod
    def of(cls, trace: Trace, by: By, shapes: Mapping[str, tuple[int, ...]]) -> Clusters:
        """Clusters for counts of these shapes, grouped by sequence columns.

        Raises BadInput for a column that is not there, has missing values, or has the name of a dimension.
        """
        columns = _columns(trace, by)
        group, labels = np.zeros(len(trace.sequences), np.int64), {}
        for name in columns:
            code, found = pd.factorize(trace.sequences[name], sort=True)
            values = found.astype(object) if isinstance(found, pd.CategoricalIndex) else found
            labels[beside(name, OF_STATISTICS)] = np.asarray(values)
            group = group * len(found) + code
        n_groups = math.prod(len(found) for found in labels.values())
        document_id, _ = pd.factorize(trace.sequences[trace.cluster])
        document, first = pd.factorize(group * (document_id.max(initial=0) + 1) + document_id)
        group_of_document = np.empty(len(first), np.int64)
        group_of_document[document] = group
        features = sum(map(math.prod, shapes.values()))
        most = int(np.clip(_MOST_COUNTS // max(1, features * n_groups), _FEWEST_BUNDLES, _MOST_BUNDLES))
        bundle = _bundles(group_of_document, most)
        cluster, found = pd.factorize(bundle)
        group_of_cluster = np.empty(len(found), np.int64)
        group_of_cluster[cluster] = group_of_document
        numbers = trace.sequences.index.to_numpy(np.int64)
        return cls(labels, _scatter(numbers, cluster[document]), group_of_cluster, _scatter(numbers, document))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(labels) for labels in self.by.values())

    @property
    def n_groups(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """Columns of a few whole sequences.

    columns   as `Trace.blocks` gives them, without "sequence"
    sequence  [token]
    clusters  rows of the totals, one for each distinct cluster at hand
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
        """Column [token, layer, x] as a contiguous [layer, x, token]: what follows walks through memory in order."""
        return np.ascontiguousarray(self.columns[name][:, layers].transpose(1, 2, 0))

    def each_layer(
        self, name: str, add: Callable[[int, np.ndarray], None], layers: slice | list[int] = slice(None)
    ) -> None:
        """Call `add` with the index and the values [x, token] of every layer, on all cores: each in its own totals."""
        indices = np.arange(self.columns[name].shape[1])[layers]
        at_a_time = max(1, -(-len(indices) // cores()))

        def some(start: int) -> None:
            here = indices[start : start + at_a_time]
            # One after the other, so that the copies of all do not lie in memory at once.
            for part in np.array_split(here, -(-len(here) // 8)):
                for offset, values in enumerate(self.by_layer(name, part.tolist())):
                    add(start + int(part[0] - here[0]) + offset, values)

        in_threads(some, range(0, len(indices), at_a_time))

    def count(self, codes: np.ndarray, size: int, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """How often each code 0 .. size-1 comes up in each cluster [cluster, size]; codes [..., token of `where`]."""
        from scipy.sparse import coo_array  # here, since it takes a fifth of a second

        # A sparse matrix adds up in compiled code during which other threads run, as they do not during np.add.at.
        codes = codes.astype(np.int32, copy=False)
        rows = np.broadcast_to(self.local[where].astype(np.int32), codes.shape)
        ones = np.ones(codes.size, np.uint32)
        return coo_array((ones, (rows.ravel(), codes.ravel())), shape=(len(self.clusters), size)).toarray()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Numbers or booleans [..., token] added up in each cluster [cluster, ...]."""
        values = values.view(np.uint8) if values.dtype == bool else values
        starts = np.flatnonzero(np.diff(self.local, prepend=-1))
        of_run = np.add.reduceat(values, starts, axis=-1, dtype=np.float64)
        out = np.zeros((len(self.clusters), *values.shape[:-1]))
        np.add.at(out, self.local[starts], np.moveaxis(of_run, -1, 0))
        return out

    def follows(self) -> np.ndarray:
        """[token] whether the token comes directly after the one before it, in one sequence; needs "position"."""
        out = np.zeros(self.n_tokens, bool)
        out[1:] = (np.diff(self.sequence) == 0) & (np.diff(self["position"]) == 1)
        return out


@dataclass(frozen=True)
class Reading:
    """Columns of a trace that a pass reads, about so many tokens at a time."""

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
    """What is counted in a pass: `add` puts each block into totals of these shapes, which start at 0."""

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
    """The counts of some clusters, which grow block by block.

    present    numbers of the clusters [row]
    totals     [row, ...]
    tokens     [row]
    documents  numbers of those that have a token
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
        """Add counts of some of the clusters."""
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
    """Run once through columns of the trace, or through `blocks`; `add` puts each block into the totals.

    blocks  have the column "sequence", as what is read has
    by      sequence columns to group by, or the clusters themselves
    shapes  {name: shape without the cluster}, for totals that start at 0
    dtype   of the totals; of whole numbers where nothing else is added up
    """
    clusters = by if isinstance(by, Clusters) else Clusters.of(trace, by, shapes)
    counting = Counting(clusters, shapes, add, dtype)
    if isinstance(blocks, Reading):
        if (shared := _shared.get()) is not None and not shared.used:
            return shared.counts_of(trace, counting, blocks)
        (counted,) = one_pass(trace, [(counting, blocks)])
    else:
        counted = Counted(counting, np.arange(len(clusters.group)))
        for columns in blocks:
            counted.feed(counting, columns)
    return counting.finished(trace, counted)


def one_pass(trace: Trace, countings: Countings) -> list[Counted]:
    """The counts of several statistics while the trace is read once.

    Those of each shard are added up in the order of the shards, so that it does not matter who counts them; whole
    numbers may be added up as they come.
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
    """The counts of each part, in order, by a backend of joblib."""
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
    """Count the tokens of a part of the trace into what is counted so far."""
    names = list(dict.fromkeys(name for _, reading in countings for name in reading.names))
    tokens = min(reading.tokens for _, reading in countings)
    for columns in part.blocks(*names, tokens=tokens):

        def feed(one: tuple[tuple[Counting, Reading], Counted], columns: dict[str, np.ndarray] = columns) -> None:
            (counting, reading), into = one
            into.feed(counting, {name: columns[name] for name in reading.names})

        in_threads(feed, zip(countings, counted, strict=True))


class _Postponed(Exception):
    """A statistic has said what it counts, and waits for the pass."""


@dataclass
class _Shared:
    """A statistic's part of one pass: it is called once to learn what it counts, and again with the counts.

    used  whether it has had its counts; what it counts beyond them, it counts by itself
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
    """What the functions compute of a trace, all counted while it is read once.

    A function whose counts follow from others, and need several passes, computes by itself.
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
    """Add how often each expert is chosen, in the first `slots` or any, to [cluster, layer, expert]."""

    def add(layer: int, ids: np.ndarray) -> None:
        chosen[block.clusters, layer] += block.count(ids[:slots], chosen.shape[-1])

    block.each_layer("expert_id", add)


def layer_by_layer(clusters: Clusters, n_layers: int, cells: int) -> list[slice]:
    """Layers, as many at a time as their counts of so many cells a cluster and layer fit into memory.

    All of them where a caller wants the counts themselves.
    """
    most = n_layers if _summed.get() is not None else max(1, _MOST_AT_A_TIME // (max(1, len(clusters.group)) * cells))
    return [slice(start, min(start + most, n_layers)) for start in range(0, n_layers, most)]


def joined(parts: Sequence[xr.Dataset], level: float) -> xr.Dataset:
    """Some layers of a statistic after the other; cells are tested as one family."""
    if len(parts) == 1:
        return parts[0]
    untested = [part.drop_vars(("q", "survives"), errors="ignore") for part in parts]
    data = xr.concat(
        untested, "layer", data_vars="minimal", coords="minimal", compat="override", combine_attrs="override"
    )
    return with_survivors(data.drop_vars("p"), data["p"], level) if "p" in data else data


def require(trace: Any, what: str, *signals: str, bootstrap: Any = DEFAULT) -> None:
    """Raises BadInput unless statistic `what` got a trace and a Bootstrap, MissingSignal where the trace lacks one."""
    if not callable(getattr(trace, "require", None)):
        raise BadInput(
            f"Cannot compute {what}: expected a trace, got {type(trace).__name__}. Pass what ml.record, a Recorder or "
            "ml.open returns.",
            argument="trace",
            value=type(trace).__name__,
        )
    if not isinstance(bootstrap, Bootstrap):
        raise BadInput(
            f"Cannot compute {what} with bootstrap={bootstrap!r}: expected a Bootstrap. Pass "
            "ml.stats.Bootstrap(replicates=1000), or leave it out.",
            argument="bootstrap",
            value=bootstrap,
        )
    trace.require(what, *signals)


def clustered(trace: Trace, cluster: str | None) -> Trace:
    """The trace with a column of its sequences in the place of documents, as what varies independently.

    Raises BadInput for a column that is not there, or has missing values.
    """
    if cluster is None or not isinstance(getattr(trace, "sequences", None), pd.DataFrame):
        return trace
    _columns(trace, cluster, "cluster")
    own = copy.copy(trace)
    own.cluster = cluster
    return own


def with_ids(trace: Trace, what: str) -> Trace:
    """The tokens that have an id; a model that was given embeddings read others.

    Raises MissingSignal where none has.
    """
    known = np.unique(np.concatenate([[-1], *(np.unique(block["token_id"]) for block in trace.blocks("token_id"))]))
    if trace.n_tokens and len(known) == 1 and trace.reduce is None:
        raise MissingSignal(
            f"Cannot compute {what}: no token of this trace has an id, since the model was given embeddings. Record a "
            "forward of token ids.",
            argument="token_id",
        )
    lacking = any(bool((block["token_id"] < 0).any()) for block in trace.blocks("token_id"))
    return trace.select(tokens=known[1:].tolist()) if lacking else trace


def reduced(trace: Trace, array: np.ndarray) -> np.ndarray:
    """An array summed over the processes that share the trace; the array itself where there is one process."""
    if trace.reduce is None:
        return array
    return trace.reduce(array.astype(np.int64) if array.dtype.kind == "u" else array)


def summarise(
    counts: Counts,
    statistic: Statistic,
    dims: Mapping[str, Any],
    bootstrap: Bootstrap,
    *,
    size: tuple[np.ndarray, tuple[str, ...]] | None = None,
    along: str = "measure",
    apart: int = 1,
    null: np.ndarray | float | None = None,
) -> xr.Dataset:
    """The Dataset of a statistic: estimate, ci_low, ci_high ``[*by, layer, *dims]``, n, n_documents and n_effective.

    With a null also p, q, survives: every cell tested against it, and adjusted for the number of cells.

    statistic  from {name: sums [layer, ..., resample]} to a quantity [layer, *dims, resample], which knows how its
               intervals are made, or to several by name; where `size` has no dimensions, {"n": [resample]} is among
               the sums
    dims       {name: labels} after layer
    size       tokens behind each number as ([cluster, ...], names of those dimensions); tokens of the group if None
    along      name of the last dimension, where there are several quantities
    apart      so many dimensions, from layer on, whose numbers do not depend on each other: the statistic is computed
               for some of them at a time, and sees them as one
    null       value without an effect, NaN for no test; broadcasts against [layer, *dims]
    """
    clusters = counts.clusters
    sizes, size_dims = (counts.tokens, ()) if size is None else size
    labels = {"layer": counts.layers, **{name: np.asarray(values) for name, values in dims.items()}}
    seen = counts.tokens > 0
    if (kept := _summed.get()) is not None:
        totals = {name: total[seen] for name, total in counts.totals.items()}
        behind = None if size_dims else sizes[seen]
        kept.append(Summed(totals, behind, statistic, labels, clusters.group[seen], counts.tokens[seen]))
    members_of = [np.flatnonzero((clusters.group == g) & seen) for g in range(clusters.n_groups)]
    n = np.stack([sizes[members].sum(0) for members in members_of]) if members_of else sizes[:0]
    shape = tuple(len(values) for values in labels.values())[:apart]
    flat = {name: total.reshape(len(total), -1, *total.shape[1 + apart :]) for name, total in counts.totals.items()}
    values_of_row = sum(math.prod(total.shape[2:]) for total in flat.values())
    parts: list[list[np.ndarray]] = []
    how: Mapping[str, Quantity] | Quantity | None = None
    for members in members_of or [np.empty(0, np.intp)]:
        behind = {} if size_dims else {"n": leaving_out(sizes[members])}
        step = max(1, _MOST_VALUES // ((1 + len(members)) * values_of_row))

        def some(start: int, members: np.ndarray = members, behind: dict = behind, step: int = step) -> Any:
            sums = {name: leaving_out(total[members, start : start + step]) for name, total in flat.items()}
            with np.errstate(divide="ignore", invalid="ignore"):
                how = statistic(sums | behind)
                return how, _stacked(how, counts.tokens[members], bootstrap.level, tested=null is not None)

        found = in_threads(some, range(0, max(1, math.prod(shape)), step))
        how = found[0][0]
        whole = [np.concatenate(arrays) for arrays in zip(*(stacked for _, stacked in found), strict=True)]
        parts.append([array.reshape(*shape, *array.shape[1:]) for array in whole])
    if isinstance(how, Mapping):
        labels[along] = np.array(list(how))
    grouped = tuple(clusters.by)

    def named(values: np.ndarray, names: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
        return (*grouped, *names), values.reshape((*clusters.shape, *values.shape[1:]))

    estimate, low, high, skew = (np.stack(arrays)[: clusters.n_groups] for arrays in zip(*parts, strict=True))
    effective = [effective_number(np.moveaxis(sizes[members], 0, -1)) for members in members_of]
    documents = np.stack(effective) if effective else sizes[:0]
    data = xr.Dataset(
        {
            "estimate": named(estimate, tuple(labels)),
            "ci_low": named(low, tuple(labels)),
            "ci_high": named(high, tuple(labels)),
            "n": named(np.rint(n).astype(np.int64), size_dims),
            "n_documents": named(counts.n_documents, ()),
            "n_effective": named(documents, size_dims),
        },
        coords={**clusters.by, **labels},
        attrs={} if how is None else {"interval": said(how)},
    )
    if null is None:
        return data
    behind = documents.reshape(-1, *(len(labels[name]) if name in size_dims else 1 for name in labels))
    each = np.broadcast_arrays(estimate, low, high, null, behind, skew)

    def test(place: tuple[int, ...]) -> np.ndarray:
        of_estimate, of_low, of_high, of_null, of_behind, of_skew = (array[place] for array in each)
        return p_against(of_estimate, of_low, of_high, of_null, of_behind, bootstrap.level, of_skew)

    tested = in_threads(test, np.ndindex(estimate.shape[:2]))
    p = np.stack(tested).reshape(estimate.shape) if tested else np.empty_like(estimate)
    return with_survivors(data, data["estimate"].copy(data=named(p, ())[1]), bootstrap.level)


def _stacked(
    quantities: Mapping[str, Quantity] | Quantity, tokens: np.ndarray, level: float, *, tested: bool
) -> list[np.ndarray]:
    """Estimate, lower and upper bound, skewness (0 unless tested) [...]; several quantities lie along a last axis."""
    if isinstance(quantities, Mapping):
        each = [_stacked(quantity, tokens, level, tested=tested) for quantity in quantities.values()]
        return [np.stack(np.broadcast_arrays(*arrays), axis=-1) for arrays in zip(*each, strict=True)]
    estimate, low, high = with_bounds(quantities, tokens, level)
    return [estimate, low, high, quantities.skewness if tested else np.zeros_like(estimate)]


@dataclass(frozen=True)
class Summed:
    """A statistic before its documents are summed up: their counts, and the function of the sums.

    labels     {dimension: labels}, layer first
    sizes      tokens behind the numbers [document], where the function of the sums needs them
    group      group of each document
    tokens     of each document
    """

    totals: dict[str, np.ndarray]
    sizes: np.ndarray | None
    statistic: Statistic
    labels: dict[str, np.ndarray]
    group: np.ndarray
    tokens: np.ndarray

    @property
    def n(self) -> int:
        return len(next(iter(self.totals.values())))

    def with_all_of(self, other: Summed) -> Summed:
        """The documents of both, those of `other` behind."""
        totals = {name: np.concatenate([total, other.totals[name]]) for name, total in self.totals.items()}
        sizes = None if self.sizes is None or other.sizes is None else np.concatenate([self.sizes, other.sizes])
        group, tokens = (np.concatenate([getattr(one, n) for one in (self, other)]) for n in ("group", "tokens"))
        return Summed(totals, sizes, self.statistic, self.labels, group, tokens)

    def only(self, group: int) -> Summed:
        """The documents of one group."""
        here = self.group == group
        totals = {name: total[here] for name, total in self.totals.items()}
        sizes = None if self.sizes is None else self.sizes[here]
        return Summed(totals, sizes, self.statistic, self.labels, self.group[here], self.tokens[here])

    def chunks(self) -> Iterator[slice]:
        """Layers, as many at a time as fit into memory with some thousand sums of each count."""
        step = max(1, _MOST_VALUES * 4 // (2048 * _features(self.totals)))
        for start in range(0, len(self.labels["layer"]), step):
            yield slice(start, start + step)

    def values(self, layers: slice, weights: np.ndarray) -> np.ndarray:
        """The statistic [layer, ..., resample] of documents with these weights [resample, document]."""
        sums = {name: np.tensordot(total[:, layers], weights, (0, 1)) for name, total in self.totals.items()}
        behind = {} if self.sizes is None else {"n": weights @ self.sizes}
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.statistic(sums | behind)
            if not isinstance(found, Mapping):
                return found.values
            return np.stack(np.broadcast_arrays(*(quantity.values for quantity in found.values())), axis=-2)


_summed: ContextVar[list[Summed] | None] = ContextVar("summed", default=None)


def summed_by(statistic: Callable[..., xr.Dataset], trace: Trace) -> Summed:
    """What `statistic` sums up over the documents of a trace.

    Raises BadInput for a function that does not sum over documents.
    """
    found: list[Summed] = []
    token = _summed.set(found)
    try:
        statistic(trace, bootstrap=Bootstrap(replicates=10))
    finally:
        _summed.reset(token)
    if not found:
        raise BadInput(
            f"Cannot contrast {getattr(statistic, '__name__', statistic)}: it is no function of sums over documents. "
            "Pass one such as ml.stats.expert_share, routing_entropy, load_balance or repetition.",
            argument="statistic",
            value=getattr(statistic, "__name__", str(statistic)),
        )
    return found[0]


def described(data: xr.Dataset, trace: Trace, bootstrap: Bootstrap, **attrs: Any) -> xr.Dataset:
    """The Dataset with its attributes: those given, the model, and how the intervals were made."""
    model = trace.meta.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    about = {"level": bootstrap.level, "model": name or "unknown", "top_k": trace.top_k}
    return data.assign_attrs(
        {**attrs, **about, **({} if trace.cluster == "document_id" else {"cluster": trace.cluster})}
    )


def _columns(trace: Trace, by: By, argument: str = "by") -> list[str]:
    columns = [by] if isinstance(by, str) else [] if by is None else list(by)
    there = [str(name) for name in trace.sequences.columns]
    for name in columns:
        if name not in there:
            raise BadInput(
                f"Cannot group by {name!r}: the sequences have the columns {', '.join(there)}. Pass one of them, or "
                "record documents that have the column.",
                argument=argument,
                value=name,
            )
        if columns.count(name) > 1:
            raise BadInput(
                f"Cannot group by {', '.join(columns)}: {name!r} is named twice. Name each column once.",
                argument="by",
                value=name,
            )
        n_missing = int(trace.sequences[name].isna().sum())
        if n_missing:
            raise BadInput(
                f"Cannot group by {name!r}: {n_missing} of {len(trace.sequences)} sequences have no {name}. Leave "
                f"them out with trace.select(where=trace.sequences[{name!r}].notna()).",
                argument=name,
                value=n_missing,
            )
    return columns


def _bundles(group: np.ndarray, most: int) -> np.ndarray:
    """[document] bundle within its group, at most `most` a group, chosen at random; as one number over all groups."""
    shuffled = np.random.default_rng(0).permutation(len(group))
    order = shuffled[np.argsort(group[shuffled], kind="stable")]
    first = np.searchsorted(group[order], group[order])
    bundle = np.empty(len(group), np.int64)
    bundle[order] = group[order] * most + (np.arange(len(group)) - first) % most
    return bundle


def _scatter(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[sequence number] value, -1 for numbers that are not there."""
    out = np.full(int(numbers.max(initial=-1)) + 1, -1, np.int64)
    out[numbers] = values
    return out


def _features(totals: Mapping[str, np.ndarray]) -> int:
    return sum(math.prod(total.shape[2:]) for total in totals.values())
