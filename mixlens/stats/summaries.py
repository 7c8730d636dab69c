"""Turn counts per document into the Dataset of a statistic: estimates, intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Quantity, effective_number, leaving_out, said, with_bounds
from mixlens.core.threads import in_threads
from mixlens.errors import BadInput
from mixlens.stats.clusters import Clusters
from mixlens.stats.counts import Counts
from mixlens.stats.multiplicity import p_against, with_survivors

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

Statistic = Callable[[dict[str, np.ndarray]], Mapping[str, Quantity] | Quantity]

_MOST_AT_A_TIME = 2**27  # counts in memory for statistics of pairs of experts (512 MB)
_MOST_VALUES = 2**18  # numbers evaluated at a time (2 MB)


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
    adjust: bool = True,
) -> xr.Dataset:
    """Return the Dataset of a statistic: estimate, ci_low, ci_high ``[*by, layer, *dims]``, n, n_documents,
    n_effective.

    With a null also p, q, survives: every cell is tested against it, with adjustment for the number of cells.

    statistic  from {name: sums [layer, ..., resample]} to a quantity [layer, *dims, resample], which knows how its
               intervals are made, or to several by name; where `size` has no dimensions, {"n": [resample]} is among
               the sums
    dims       {name: labels} after layer
    size       tokens behind each number as ([cluster, ...], names of those dimensions); tokens of the group if None
    along      name of the last dimension, where there are several quantities
    apart      so many dimensions, from layer on, whose numbers do not depend on each other: the statistic is computed
               for some of them at a time, and sees them as one
    null       value without an effect, NaN for no test; broadcasts against [layer, *dims]
    adjust     False for some layers of a statistic, which `joined` adjusts with the others
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
    behind = np.broadcast_to(behind, (*estimate.shape[:2], *behind.shape[2:]))  # no further: a quantile is slow
    nulls = np.broadcast_to(null, estimate.shape[1:])

    def test(place: tuple[int, ...]) -> np.ndarray:
        interval, units = (low[place], high[place]), behind[place]
        return p_against(estimate[place], *interval, nulls[place[1]], units, bootstrap.level, skew[place])

    tested = in_threads(test, np.ndindex(estimate.shape[:2]))
    p = np.stack(tested).reshape(estimate.shape) if tested else np.empty_like(estimate)
    tests = data["estimate"].copy(data=named(p, ())[1])
    return with_survivors(data, tests, bootstrap.level) if adjust else data.assign(p=tests)


def _stacked(
    quantities: Mapping[str, Quantity] | Quantity, tokens: np.ndarray, level: float, *, tested: bool
) -> list[np.ndarray]:
    """Return estimate, lower and upper bound, skewness (0 unless tested) [...]; quantities along the last axis."""
    if isinstance(quantities, Mapping):
        each = [_stacked(quantity, tokens, level, tested=tested) for quantity in quantities.values()]
        return [np.stack(np.broadcast_arrays(*arrays), axis=-1) for arrays in zip(*each, strict=True)]
    estimate, low, high = with_bounds(quantities, tokens, level)
    return [estimate, low, high, quantities.skewness if tested else np.zeros_like(estimate)]


@dataclass(frozen=True)
class Summed:
    """A statistic before summation: the counts of its documents, and the function of their sums.

    labels     {dimension: labels}, layer first
    sizes      sample sizes [document], if the function of the sums needs them
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
        """Return the documents of both, those of `other` last."""
        totals = {name: np.concatenate([total, other.totals[name]]) for name, total in self.totals.items()}
        sizes = None if self.sizes is None or other.sizes is None else np.concatenate([self.sizes, other.sizes])
        group, tokens = (np.concatenate([getattr(one, n) for one in (self, other)]) for n in ("group", "tokens"))
        return Summed(totals, sizes, self.statistic, self.labels, group, tokens)

    def only(self, group: int) -> Summed:
        """Return the documents of one group."""
        here = self.group == group
        totals = {name: total[here] for name, total in self.totals.items()}
        sizes = None if self.sizes is None else self.sizes[here]
        return Summed(totals, sizes, self.statistic, self.labels, self.group[here], self.tokens[here])

    def chunks(self) -> Iterator[slice]:
        """Yield slices of layers that fit into memory with some thousand sums of each count."""
        step = max(1, _MOST_VALUES * 4 // (2048 * _features(self.totals)))
        for start in range(0, len(self.labels["layer"]), step):
            yield slice(start, start + step)

    def values(self, layers: slice, weights: np.ndarray) -> np.ndarray:
        """Return the statistic [layer, ..., resample] of documents with weights [resample, document]."""
        sums = {name: np.tensordot(total[:, layers], weights, (0, 1)) for name, total in self.totals.items()}
        behind = {} if self.sizes is None else {"n": weights @ self.sizes}
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.statistic(sums | behind)
            if not isinstance(found, Mapping):
                return found.values
            return np.stack(np.broadcast_arrays(*(quantity.values for quantity in found.values())), axis=-2)


_summed: ContextVar[list[Summed] | None] = ContextVar("summed", default=None)


def summed_by(statistic: Callable[..., xr.Dataset], trace: Trace) -> Summed:
    """Return the sums over documents that `statistic` computes from a trace.

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
            f"Cannot contrast {getattr(statistic, '__name__', statistic)}: it does not sum over documents. "
            "Pass one such as ml.stats.expert_share, routing_entropy, load_balance or repetition.",
            argument="statistic",
            value=getattr(statistic, "__name__", str(statistic)),
        )
    return found[0]


def layer_by_layer(clusters: Clusters, n_layers: int, cells: int) -> list[slice]:
    """Return slices of layers whose counts fit into memory, given `cells` per cluster and layer.

    A single slice if a caller wants the counts themselves.
    """
    most = n_layers if _summed.get() is not None else max(1, _MOST_AT_A_TIME // (max(1, len(clusters.group)) * cells))
    return [slice(start, min(start + most, n_layers)) for start in range(0, n_layers, most)]


def joined(parts: Sequence[xr.Dataset], level: float) -> xr.Dataset:
    """Layers of a statistic, concatenated and tested as one family of cells."""
    data = xr.concat(parts, "layer", data_vars="minimal", coords="minimal", compat="override", combine_attrs="override")
    return with_survivors(data, data["p"], level)


def described(data: xr.Dataset, trace: Trace, bootstrap: Bootstrap, **attrs: Any) -> xr.Dataset:
    """Add attributes to a Dataset: those given, the model, and the settings of the intervals."""
    model = trace.meta.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    about = {"level": bootstrap.level, "model": name or "unknown", "top_k": trace.top_k}
    return data.assign_attrs(
        {**attrs, **about, **({} if trace.cluster == "document_id" else {"cluster": trace.cluster})}
    )


def _features(totals: Mapping[str, np.ndarray]) -> int:
    return sum(math.prod(total.shape[2:]) for total in totals.values())
