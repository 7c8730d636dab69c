"""Predict the first choice from tables of tokens and token pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixlens.core.threads import in_threads
from mixlens.stats.counts import reduced
from mixlens.trace.shards import id_dtype

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_TABLE_BYTES = 2**29

# Token pairs are hashed into buckets. The most frequent buckets are kept; other pairs back off to the token.
_BUCKET_BITS, _MOST_PAIRS = 24, 2**17

# Weight of the coarser distribution within the finer one, in observations.
BACK_OFF = 4.0


@dataclass(frozen=True)
class Features:
    """Features of a token that predict its first choice.

      type_of_token   [token id] index of the token type, -1 if it does not occur
      pair_of_bucket  [bucket] index of the token pair hashed there, -1 if it is not kept
      type_of_pair    [pair] type of its second token
      n_folds         number of folds of the documents
      fold            [sequence number]

    The predictions for one layer are one array: n_folds rows for the majority, then [fold, type], then [fold, pair].
    """

    type_of_token: np.ndarray
    pair_of_bucket: np.ndarray
    type_of_pair: np.ndarray
    n_folds: int
    fold: np.ndarray

    @classmethod
    def of(cls, trace: Trace, fold: np.ndarray, n_folds: int) -> Features:
        seen = occurrences(trace, np.zeros(len(fold), np.int64), 1)[0] > 0
        type_of_token = np.where(seen, np.cumsum(seen) - 1, -1)
        found = np.zeros(2**_BUCKET_BITS, np.int32)
        for columns in trace.blocks("sequence", "position", "token_id"):
            second, bucket = _pairs(columns)
            np.add.at(found, bucket, np.int32(1))
        found = reduced(trace, found)
        kept = np.flatnonzero(found >= 2)
        if len(kept) > _MOST_PAIRS:
            kept = np.sort(kept[np.argpartition(-found[kept], _MOST_PAIRS)[:_MOST_PAIRS]])
        pair_of_bucket = np.full(len(found), -1, np.int32)
        pair_of_bucket[kept] = np.arange(len(kept))
        # The mean type, so that processes can sum: collisions within a bucket are rare, and then any type will do.
        types = np.zeros(len(kept))
        for columns in trace.blocks("sequence", "position", "token_id"):
            second, bucket = _pairs(columns)
            pair = pair_of_bucket[bucket]
            known = pair >= 0
            np.add.at(types, pair[known], type_of_token[columns["token_id"][second[known]]])
        type_of_pair = np.rint(reduced(trace, types) / found[kept]).astype(np.int64)
        return cls(type_of_token, pair_of_bucket, type_of_pair, n_folds, fold)

    @property
    def n_types(self) -> int:
        return int(self.type_of_token.max(initial=-1)) + 1

    @property
    def n_rows(self) -> int:
        return self.n_folds * (1 + self.n_types + len(self.type_of_pair))

    def rows(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[token] rows for the majority, for the token, and for the pair or, where it is not kept, for the token."""
        fold = self.fold[columns["sequence"]]
        of_token = self.n_folds + fold * self.n_types + self.type_of_token[columns["token_id"]]
        of_pair = of_token.copy()
        second, bucket = _pairs(columns)
        pair = self.pair_of_bucket[bucket]
        second, pair = second[pair >= 0], pair[pair >= 0]
        first_row = self.n_folds * (1 + self.n_types)
        of_pair[second] = first_row + fold[second] * len(self.type_of_pair) + pair
        return fold, of_token, of_pair

    def predict(self, table: np.ndarray) -> np.ndarray:
        """Expert [row] predicted from the other folds, by counts [expert, row] of one layer; majority rows unused."""
        n_experts, start = len(table), self.n_folds
        by_type = table[:, start : start + self.n_folds * self.n_types].reshape(n_experts, self.n_folds, -1)
        by_pair = table[:, start + self.n_folds * self.n_types :].reshape(n_experts, self.n_folds, -1)
        by_type = (by_type.sum(1, keepdims=True) - by_type).astype(np.float32)
        by_pair = (by_pair.sum(1, keepdims=True) - by_pair).astype(np.float32)
        majority = by_type.sum(-1, keepdims=True)
        by_type += BACK_OFF * majority / majority.sum(0)
        finest = BACK_OFF * by_type / by_type.sum(0)
        by_pair += finest.take(self.type_of_pair, axis=2)
        return np.concatenate([_largest(scores).ravel() for scores in (majority, by_type, by_pair)])


def predictions(trace: Trace, features: Features, layers: np.ndarray) -> np.ndarray:
    """Predict an expert for every row of the features [layer, row] from the first choices at `layers`."""
    table = np.zeros((len(layers), trace.n_experts * features.n_rows), np.int32)
    # np.add.at is fifty times faster if the summand has the dtype of the table.
    for columns in trace.blocks("sequence", "position", "token_id", "expert_id"):
        _, of_token, of_pair = features.rows(columns)
        has_pair = np.flatnonzero(of_pair != of_token)
        of_pair = of_pair[has_pair]
        for i, layer in enumerate(layers):
            first = columns["expert_id"][:, layer, 0] * np.int64(features.n_rows)
            np.add.at(table[i], first + of_token, np.int32(1))
            np.add.at(table[i], first[has_pair] + of_pair, np.int32(1))
    table = reduced(trace, table).reshape(len(layers), trace.n_experts, -1)
    return np.stack(in_threads(features.predict, table))


def occurrences(trace: Trace, group_of_sequence: np.ndarray, n_groups: int) -> np.ndarray:
    """Count each token id in each group of sequences [group, token id]."""
    found = np.zeros((n_groups, 1), np.int64)
    for columns in trace.blocks("sequence", "token_id"):
        token_id, group = columns["token_id"], group_of_sequence[columns["sequence"]]
        if len(token_id) == 0:
            continue
        found = _widened(found, max(found.shape[1], int(token_id.max()) + 1))
        found += np.bincount(group * found.shape[1] + token_id, minlength=found.size).reshape(found.shape)
    # Processes agree on a width: each marks the power of two that covers its ids, and the largest mark wins.
    marks = np.zeros(64, np.int64)
    marks[(found.shape[1] - 1).bit_length()] = 1
    return reduced(trace, _widened(found, 2 ** int(np.flatnonzero(reduced(trace, marks)).max())))


def layer_groups(trace: Trace, bytes_a_layer: int) -> Iterator[np.ndarray]:
    """Yield indices of layers in batches whose tables of `bytes_a_layer` fit into half a gigabyte."""
    at_once = max(1, _TABLE_BYTES // max(1, bytes_a_layer))
    for start in range(0, trace.n_layers, at_once):
        yield np.arange(start, min(start + at_once, trace.n_layers))


def _pairs(columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that directly follow another one in their sequence, and the bucket of each such pair."""
    follows = (np.diff(columns["sequence"]) == 0) & (np.diff(columns["position"]) == 1)
    second = np.flatnonzero(follows) + 1
    token_id = columns["token_id"].astype(np.uint64)
    pair = (token_id[second - 1] << np.uint64(32)) | token_id[second]
    # Multiplicative hashing with 2**64 over the golden ratio; the upper bits are well mixed.
    return second, ((pair * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64)


def _widened(counts: np.ndarray, width: int) -> np.ndarray:
    return np.pad(counts, ((0, 0), (0, width - counts.shape[1]))) if width > counts.shape[1] else counts


def _largest(scores: np.ndarray) -> np.ndarray:
    """Return the argmax along the first axis, the lower index for ties, as `id_dtype`."""
    best, top = np.zeros(scores.shape[1:], id_dtype(len(scores))), scores[0].copy()
    for expert in range(1, len(scores)):
        np.maximum(best, (scores[expert] > top) * best.dtype.type(expert), out=best)
        np.maximum(top, scores[expert], out=top)
    return best
