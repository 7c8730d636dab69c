"""Shared code of measurements over documents: reading runs, grouping documents, statistics of sums."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import xarray as xr
from safetensors.numpy import load_file

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.names import OF_STATISTICS, beside
from mixlens.core.run_dir import open_run
from mixlens.errors import BadInput
from mixlens.stats.clusters import By, Clusters
from mixlens.stats.counts import Counts
from mixlens.stats.summaries import Statistic, summarise
from mixlens.trace.shards import read_vocabulary

VOCABULARY = "vocabulary.parquet"


@dataclass(frozen=True)
class Measured:
    """A measurement: arrays over documents or tokens, the columns of the documents, and metadata."""

    arrays: dict[str, np.ndarray]
    documents: pd.DataFrame
    meta: dict[str, Any]
    vocabulary: pd.Series | None = None

    def columns(self, own: Collection[str]) -> dict[str, np.ndarray]:
        """Return the documents' columns [document], renamed if they collide with `own`."""
        return {beside(str(name), own): self.documents[name].to_numpy(object) for name in self.documents}

    def along_documents(
        self, data: Mapping[str, tuple[Any, Any]], coords: Mapping[str, Any], attrs: Mapping[str, Any]
    ) -> xr.Dataset:
        """Return sums over documents as a Dataset, with the documents' columns as coordinates."""
        own = {*data, *coords, "document"}
        columns = {name: ("document", values) for name, values in self.columns(own).items()}
        return xr.Dataset(data, {**columns, **coords}, attrs)


def read_measured(path: str | os.PathLike[str], kind: str, *, check: bool = True) -> Measured:
    """Read the run of this kind at `path` into memory.

    Raises RunError if the run is missing, unfinished, altered, or of another kind.
    """
    run = open_run(path, kind, check=check)
    names = sorted(name for name in run.meta["files"] if name.startswith(f"{kind}-"))
    shards = [load_file(run.file(name)) for name in names]
    arrays = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    columns = pq.read_table(run.file("documents.parquet")).to_pydict()
    documents = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    vocabulary = read_vocabulary(run.file(VOCABULARY)) if VOCABULARY in run.meta["files"] else None
    return Measured(arrays, documents, run.meta, vocabulary)


def check_kind(measured: Any, kind: str, made_by: str) -> None:
    """Raise BadInput unless `measured` is the result of `made_by`."""
    found = measured.attrs.get("kind") if isinstance(measured, xr.Dataset) else None
    if found != kind:
        raise BadInput(
            f"Cannot compute {kind} from a {type(measured).__name__}{f' of {found}' if found else ''}. Pass what "
            f"{made_by} returns, or mixlens.open(its folder).",
            argument="kind",
            value=found or type(measured).__name__,
        )


def groups_of(
    measured: xr.Dataset, by: str | Sequence[str] | None, argument: str = "by"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return ({column: its labels}, group of each document, counted over the product of the labels).

    Raises BadInput for a column that does not exist or that some documents lack.
    """
    there = [str(name) for name in measured.coords if measured[name].dims == ("document",)]
    labels: dict[str, np.ndarray] = {}
    group = np.zeros(measured.sizes["document"], np.int64)
    for name in [by] if isinstance(by, str) else [] if by is None else list(by):
        held = name if name in there else f"document_{name}"  # renamed because a measured quantity has this name
        if held not in there:
            raise BadInput(
                f"Cannot group by {name!r}: the documents have the columns {', '.join(there)}. Pass one of them, or "
                "measure documents that have the column.",
                argument=argument,
                value=name,
            )
        values = measured[held].values
        if any(value is None or value != value for value in values):
            raise BadInput(
                f"Cannot group by {name!r}: some documents have no {name}. Give every document one, or leave those "
                "out: measured.isel(document=...).",
                argument=name,
                value=None,
            )
        found, code = np.unique(values, return_inverse=True)
        labels[beside(name, OF_STATISTICS)], group = found, group * len(found) + code
    return labels, group


def _units(measured: xr.Dataset, group: np.ndarray, cluster: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each unit and the unit of each document: documents of one group and cluster."""
    if cluster is None:
        return group, np.arange(len(group))
    _, of_cluster = groups_of(measured, cluster, "cluster")
    found, unit = np.unique(np.stack([group, of_cluster]), axis=1, return_inverse=True)
    return found[0], unit.reshape(-1)


def predicted_alone(measured: xr.Dataset) -> xr.Dataset:
    """Count the length of documents only if they have predicted tokens, so that shares use the same documents."""
    return measured.assign(length=measured.length.where(measured.tokens > 0, 0))


def summarised(
    sums: xr.Dataset,
    names: tuple[str, ...],
    statistic: Statistic,
    dims: Mapping[str, Any],
    by: By,
    bootstrap: Bootstrap,
    *,
    tokens: str = "tokens",
    along: str = "measure",
    null: np.ndarray | float | None = None,
    cluster: str | None = None,
) -> xr.Dataset:
    """Return a statistic of the sums `names` over documents as a Dataset, like `summaries.summarise`.

    dims     {name: labels} after layer; without a layer in the sums, the Dataset has none
    tokens   sample sizes [document, ...]; the sums include {"n": ...} if it is [document]
    cluster  column of the documents that replaces documents as the independent unit
    """
    labels, group = groups_of(sums, by if by is None or isinstance(by, str) else list(by))
    group, unit = _units(sums, group, cluster)

    def added(values: np.ndarray) -> np.ndarray:
        if cluster is None:
            return values
        of_units = np.zeros((len(group), *values.shape[1:]))
        np.add.at(of_units, unit, values)
        return of_units

    layered = "layer" in sums[names[0]].dims
    totals = {name: added(sums[name].values if layered else sums[name].values[:, None]) for name in names}
    size, length = added(sums[tokens].values), added(sums["length"].values)
    read = size if size.ndim == 1 else length
    n_groups = int(np.prod([len(values) for values in labels.values()], dtype=int))
    counts = Counts(
        Clusters(labels, np.empty(0, np.int64), group, np.empty(0, np.int64)),
        totals,
        read.astype(float),
        np.bincount(group[read > 0], minlength=n_groups),
        sums.layer.values if layered else np.zeros(1, np.int64),
    )
    of_size = (size.astype(float), ("layer", "expert")[: size.ndim - 1])
    data = summarise(counts, statistic, dims, bootstrap, size=of_size, along=along, null=null)
    data = data if layered else data.isel(layer=0, drop=True)
    return data.assign_attrs({} if cluster is None else {"cluster": cluster})
