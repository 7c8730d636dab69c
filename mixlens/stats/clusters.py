"""Clusters of documents, the independent units of intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mixlens.core.names import OF_STATISTICS, beside
from mixlens.errors import BadInput

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

By = str | Sequence[str] | None

# Limits of counts in memory (128 MB), and of documents or bundles of documents per group.
_MOST_COUNTS, _FEWEST_BUNDLES, _MOST_BUNDLES = 2**24, 50, 512


@dataclass(frozen=True)
class Clusters:
    """Independent units of a statistic: the documents of each group.

      by           {sequence column, renamed if it collides with a statistic: its labels}, the dimensions of the groups
      of_sequence  [sequence number] cluster of each sequence
      group        [cluster] group, counted over the product of the labels
      document     [sequence number] document within its group, for counting documents

    A cluster is a document. With more documents than fit in memory, or more than 512 per group, documents are combined
    at random into bundles of equal size, which are as independent as documents.
    """

    by: Mapping[str, np.ndarray]
    of_sequence: np.ndarray
    group: np.ndarray
    document: np.ndarray

    @classmethod
    def of(cls, trace: Trace, by: By, shapes: Mapping[str, tuple[int, ...]]) -> Clusters:
        """Return clusters for counts of these shapes, grouped by sequence columns.

        Raises BadInput for a column that does not exist, has missing values, or has the name of a dimension.
        """
        columns = group_columns(trace, by)
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


def group_columns(trace: Trace, by: By, argument: str = "by") -> list[str]:
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
    """Return bundle numbers [document], at most `most` per group, assigned at random within groups."""
    shuffled = np.random.default_rng(0).permutation(len(group))
    order = shuffled[np.argsort(group[shuffled], kind="stable")]
    first = np.searchsorted(group[order], group[order])
    bundle = np.empty(len(group), np.int64)
    bundle[order] = group[order] * most + (np.arange(len(group)) - first) % most
    return bundle


def _scatter(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return values by sequence number, -1 for absent numbers."""
    out = np.full(int(numbers.max(initial=-1)) + 1, -1, np.int64)
    out[numbers] = values
    return out
