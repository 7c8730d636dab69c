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
from mixlens.errors import BadInput, MissingSignal
from mixlens.stats.multiplicity import p_against, skewness, with_survivors

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

By = str | Sequence[str] | None
Statistic = Callable[[dict[str, np.ndarray]], Mapping[str, Quantity] | Quantity]

# Counts kept (128 MB), documents or bundles of documents a group, and numbers evaluated at a time (8 MB).
_MOST_AT_A_TIME = 2**26  # counts that a statistic of pairs of experts holds (512 MB)
_MOST_COUNTS, _FEWEST_BUNDLES, _MOST_BUNDLES = 2**24, 50, 512
_MOST_VALUES = 2**20

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
    clusters  the distinct clusters at hand
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

    def count(self, codes: np.ndarray, size: int, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """How often each code 0 .. size-1 comes up in each cluster [cluster, size]; codes [..., token of `where`]."""
        out = np.zeros(len(self.clusters) * size, np.uint32)
        # Three times as fast as np.bincount, which looks for the smallest and the largest first.
        np.add.at(out, (self.local[where] * size + codes).ravel(), np.uint32(1))
        return out.reshape(-1, size)

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
    """Columns of a trace that a pass reads, block by block."""

    trace: Trace
    names: tuple[str, ...]
    tokens: int = 65_536

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.trace.blocks(*self.names, tokens=self.tokens)


@dataclass(frozen=True)
class Counts:
    """Counts of every cluster, each [cluster, layer, ...], and tokens [cluster]."""

    clusters: Clusters
    totals: dict[str, np.ndarray]
    tokens: np.ndarray
    n_documents: np.ndarray
    layers: np.ndarray


def count(
    trace: Trace,
    by: By | Clusters,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Iterable[dict[str, np.ndarray]],
    add: Callable[[Block, dict[str, np.ndarray]], None],
) -> Counts:
    """Run once through `blocks`, which have the column "sequence"; `add` puts each block into the totals.

    by      sequence columns to group by, or the clusters themselves
    shapes  {name: shape without the cluster}, for totals of float64 that start at 0
    """
    clusters = by if isinstance(by, Clusters) else Clusters.of(trace, by, shapes)
    counting = Counting(trace, clusters, shapes, add)
    if (shared := _shared.get()) is not None and isinstance(blocks, Reading) and not shared.used:
        return shared.counts_of(counting, blocks)
    for columns in blocks:
        counting.feed(columns)
    return counting.finished()


class Counting:
    """Counts that grow block by block."""

    def __init__(
        self,
        trace: Trace,
        clusters: Clusters,
        shapes: Mapping[str, tuple[int, ...]],
        add: Callable[[Block, dict[str, np.ndarray]], None],
    ) -> None:
        self._trace, self._clusters, self._add = trace, clusters, add
        self._shapes = shapes
        self._totals: dict[str, np.ndarray] = {}
        self._tokens = np.zeros(len(clusters.group))
        self._of_document = np.zeros(int(clusters.document.max(initial=-1)) + 1)

    def feed(self, columns: Mapping[str, np.ndarray]) -> None:
        columns = dict(columns)
        sequence = columns.pop("sequence")
        self._start()
        if len(sequence) == 0:
            return
        present, local = np.unique(self._clusters.of_sequence[sequence], return_inverse=True)
        self._tokens[present] += np.bincount(local)
        self._of_document += np.bincount(self._clusters.document[sequence], minlength=len(self._of_document))
        self._add(Block(columns, sequence, present, local), self._totals)

    def finished(self) -> Counts:
        self._start()
        trace, clusters = self._trace, self._clusters
        totals = {name: reduced(trace, array) for name, array in self._totals.items()}
        numbers = np.flatnonzero(clusters.document >= 0)
        group_of_document = np.zeros(len(self._of_document), np.int64)
        group_of_document[clusters.document[numbers]] = clusters.group[clusters.of_sequence[numbers]]
        seen = reduced(trace, self._of_document) > 0
        n_documents = np.bincount(group_of_document[seen], minlength=clusters.n_groups)
        return Counts(clusters, totals, reduced(trace, self._tokens), n_documents, trace.layers)

    def _start(self) -> None:
        if not self._totals:
            n = len(self._clusters.group)
            self._totals = {name: np.zeros((n, *shape)) for name, shape in self._shapes.items()}


class _Postponed(Exception):
    """A statistic has said what it counts, and waits for the pass."""


@dataclass
class _Shared:
    """A statistic's part of one pass: it is called once to learn what it counts, and again with the counts.

    used  whether it has had its counts; what it counts beyond them, it counts by itself
    """

    counting: Counting | None = None
    reading: Reading | None = None
    used: bool = False

    def counts_of(self, counting: Counting, reading: Reading) -> Counts:
        if self.counting is None:
            self.counting, self.reading = counting, reading
            raise _Postponed
        found, self.counting, self.used = self.counting.finished(), None, True
        return found


_shared: ContextVar[_Shared | None] = ContextVar("shared", default=None)


def in_one_pass(computing: Mapping[str, Callable[[], xr.Dataset]]) -> dict[str, xr.Dataset]:
    """What the functions compute, all counted while the trace is read once.

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
    readings = [shared.reading for shared in waiting.values() if shared.reading is not None]
    if readings:
        names = dict.fromkeys(name for reading in readings for name in reading.names)
        for columns in readings[0].trace.blocks(*names, tokens=min(reading.tokens for reading in readings)):
            for shared in waiting.values():
                if shared.counting is not None and shared.reading is not None:
                    shared.counting.feed({own: columns[own] for own in shared.reading.names})
    for name, shared in waiting.items():
        token = _shared.set(shared)
        try:
            found[name] = computing[name]()
        finally:
            _shared.reset(token)
    return {name: found[name] for name in computing}


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
    return array if trace.reduce is None else trace.reduce(array)


def summarise(
    counts: Counts,
    statistic: Statistic,
    dims: Mapping[str, Any],
    bootstrap: Bootstrap,
    *,
    size: tuple[np.ndarray, tuple[str, ...]] | None = None,
    along: str = "measure",
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
    parts: list[list[np.ndarray]] = []
    how: Mapping[str, Quantity] | Quantity | None = None
    for members in members_of or [np.empty(0, np.intp)]:
        behind = {} if size_dims else {"n": leaving_out(sizes[members])}
        step = max(1, _MOST_VALUES // ((1 + len(members)) * _features(counts.totals)))
        found = []
        for start in range(0, max(1, len(counts.layers)), step):
            layers = slice(start, start + step)
            sums = {name: leaving_out(total[members, layers]) for name, total in counts.totals.items()}
            with np.errstate(divide="ignore", invalid="ignore"):
                how = statistic(sums | behind)
            found.append(_stacked(how, counts.tokens[members], bootstrap.level, tested=null is not None))
        parts.append([np.concatenate(arrays) for arrays in zip(*found, strict=True)])
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
    p = p_against(estimate, low, high, null, behind, bootstrap.level, skew)
    return with_survivors(data, data["estimate"].copy(data=named(p, ())[1]), bootstrap.level)


def _stacked(
    quantities: Mapping[str, Quantity] | Quantity, tokens: np.ndarray, level: float, *, tested: bool
) -> list[np.ndarray]:
    """Estimate, lower and upper bound, skewness (0 unless tested) [...]; several quantities lie along a last axis."""
    if isinstance(quantities, Mapping):
        each = [_stacked(quantity, tokens, level, tested=tested) for quantity in quantities.values()]
        return [np.stack(np.broadcast_arrays(*arrays), axis=-1) for arrays in zip(*each, strict=True)]
    estimate, low, high = with_bounds(quantities, tokens, level)
    return [estimate, low, high, skewness(quantities.values) if tested else np.zeros_like(estimate)]


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
