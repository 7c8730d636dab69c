"""Share of routing explained by the token itself, and by its context.

Both statistics need tables by token type, too large to keep per document. They read the trace several times, for as
many layers at once as fit into half a gigabyte.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Share
from mixlens.errors import BadInput
from mixlens.stats.clusters import By, Clusters
from mixlens.stats.contexts import BACK_OFF, Features, layer_groups, occurrences, predictions
from mixlens.stats.counts import Block, Counts, count, reduced
from mixlens.stats.inputs import clustered, require, with_ids
from mixlens.stats.published import OLMOE
from mixlens.stats.summaries import described, summarise
from mixlens.trace.shards import id_dtype

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_FOLDS = 5


def vocabulary_specialization(
    trace: Trace, *, by: By = None, min_count: int = 10, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the share of a token type's best expert, averaged over types.

    mean over token types x with N_x >= min_count of max_e N_xe / N_x, with N_xe the occurrences of x that choose e in
    any slot (Muennighoff et al. 2024, eq. 8). The maximum is biased upwards for rare types: compare only numbers with
    the same min_count and about the same number of tokens.

    The interval is for the mean over other samples with as many documents, and shares the upward bias; it does not
    cover the value for infinitely many. It takes the types and the best expert of each as given, in a linear
    approximation of the mean, because the counts of every type cannot be kept for every document.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; token_id.
    by : By, optional
        Column or columns of the sequences to group by.
    min_count : int, optional
        Least number of occurrences of a type.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high ``[*by, layer]``; n (tokens of the types counted) and n_types
        ``[*by]``; NaN if no type is frequent enough.

    Raises
    ------
    MissingSignal
        If the trace has no token ids.
    BadInput
        If min_count is below 1, or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.vocabulary_specialization(trace)["estimate"].dims
    ('layer',)
    """
    trace = clustered(trace, cluster)
    require(trace, "vocabulary_specialization", "expert_id", "token_id", bootstrap=bootstrap)
    if min_count < 1:
        raise BadInput(
            f"Cannot compute vocabulary_specialization with min_count={min_count}: a type occurs at least once. Pass "
            "10, as in the OLMoE paper.",
            argument="min_count",
            value=min_count,
        )
    trace = with_ids(trace, "vocabulary_specialization")
    clusters = Clusters.of(trace, by, {"share": (trace.n_layers,), "tokens": ()})
    types = _Types.of(trace, clusters, min_count)
    columns = ("sequence", "token_id", "expert_id")
    parts = []
    for layers in layer_groups(trace, 4 * trace.n_experts * len(types.n)):
        best, share = types.best(trace, layers)
        mean = types.mean(share)

        def add(block: Block, totals: dict[str, np.ndarray], layers=layers, best=best, share=share, mean=mean) -> None:
            row = types.rows(block.sequence, block["token_id"])
            known = np.flatnonzero(row >= 0)
            row, group, leverage = row[known], types.group[row[known]], types.leverage[row[known]]
            totals["tokens"][block.clusters] += block.count(np.zeros_like(known), 1, known)[:, 0]

            def add_layer(i: int, ids: np.ndarray) -> None:
                hit = (ids.take(known, axis=1) == best[i].take(row)).any(0)
                value = np.zeros(block.n_tokens)
                value[known] = mean[i].take(group) + leverage * (hit - share[i].take(row))
                totals["share"][block.clusters, i] += block.sums(value)

            block.each_layer("expert_id", add_layer, layers.tolist())

        parts.append(count(trace, clusters, {"share": (len(layers),), "tokens": ()}, trace.blocks(*columns), add))
    counts = _joined(parts, "share")
    tokens = parts[0].totals["tokens"]
    data = summarise(counts, lambda sums: Difference(sums["share"], sums["n"]), {}, bootstrap, size=(tokens, ()))
    data.attrs["interval"] += ", for as many documents"
    data["n_types"] = (tuple(clusters.by), types.n_of_group.reshape(clusters.shape))
    return described(
        data, trace, bootstrap,
        statistic="vocabulary_specialization", unit="fraction", min_count=min_count,
        formula="mean_x max_e N_xe / N_x over token types with N_x >= min_count", source=f"{OLMOE}, eq. 8",
    )  # fmt: skip


def predictability(
    trace: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Measure how well the text predicts the first choice, as accuracy on held-out documents.

    majority
        always the most frequent expert: chance.
    token
        the most frequent expert for the token id.
    token_and_previous
        the most frequent expert for the token and its predecessor: a lower bound on the effect of context.

    Documents are assigned to 5 folds; each is predicted from the others. There is no interval: other documents would
    train other predictors, an effect that a single recording cannot measure.

    Each distribution is smoothed with the coarser one, worth 4 observations: p(e | x) is proportional to
    N_xe + 4 p(e), p(e | x, previous) to N_yxe + 4 p(e | x). Pairs of tokens are hashed into 2**24 buckets, of which the
    131,072 most frequent, seen at least twice, are kept.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; token_id, position.
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high (NaN) ``[*by, layer, measure]``; n (tokens) ``[*by]``; the predictors
        are trained on the whole trace, whatever `by` is.

    Raises
    ------
    MissingSignal
        If the trace has no token ids.
    BadInput
        If there are fewer than two documents, or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.predictability(trace)["estimate"].dims
    ('layer', 'measure')
    """
    trace = clustered(trace, cluster)
    require(trace, "predictability", "expert_id", "token_id", "position", bootstrap=bootstrap)
    trace = with_ids(trace, "predictability")
    clusters = Clusters.of(trace, by, {"correct": (trace.n_layers, 3)})
    fold, n_folds = _folds(trace, len(clusters.of_sequence), bootstrap.seed)
    features = Features.of(trace, fold, n_folds)
    parts = []
    for layers in layer_groups(trace, 4 * trace.n_experts * features.n_rows):
        best = predictions(trace, features, layers)

        def add(block: Block, totals: dict[str, np.ndarray], layers=layers, best=best) -> None:
            rows = features.rows({**block.columns, "sequence": block.sequence})

            def add_layer(i: int, ids: np.ndarray) -> None:
                correct = np.stack([best[i].take(row) == ids[0] for row in rows])
                totals["correct"][block.clusters, i] += block.sums(correct)

            block.each_layer("expert_id", add_layer, layers.tolist())

        blocks = trace.blocks("sequence", "position", "token_id", "expert_id")
        parts.append(count(trace, clusters, {"correct": (len(layers), 3)}, blocks, add))
    data = summarise(
        _joined(parts, "correct"),
        lambda sums: Share(sums["correct"], sums["n"]),
        {"measure": ["majority", "token", "token_and_previous"]},
        bootstrap,
    )
    # Predicted documents also train the predictors of others: no interval from one recording has the nominal coverage
    # (Bates, Hastie and Tibshirani 2023), and jackknives cover only 84 to 93 % (see the benchmark).
    data = data.assign({name: data[name] * np.nan for name in ("ci_low", "ci_high")})
    why = "predictors that other documents would train differ"
    return described(
        data, trace, bootstrap,
        statistic="predictability", unit="fraction", folds=n_folds, back_off=BACK_OFF,
        formula="held-out accuracy of argmax_e p(e), p(e | token), p(e | token, previous token)",
        source="bigram model with back-off, cross-validated over documents", interval="none", no_interval=why,
    )  # fmt: skip


class _Types:
    """Token types of each group that occur at least min_count times, one row each.

    n           [row] occurrences
    group       [row]
    leverage    [row] weight of one occurrence in the mean over types, times the tokens of all types of the group
    """

    def __init__(self, group_of_sequence: np.ndarray, occurs: np.ndarray, min_count: int) -> None:
        frequent = occurs >= min_count
        self.group_of_sequence = group_of_sequence
        self.row_of = np.where(frequent, np.cumsum(frequent).reshape(frequent.shape) - 1, -1)
        self.n, self.group = occurs[frequent], np.nonzero(frequent)[0]
        self.n_of_group = frequent.sum(1)
        tokens = np.where(frequent, occurs, 0).sum(1)
        self.leverage = tokens[self.group] / (self.n_of_group[self.group] * self.n)

    @classmethod
    def of(cls, trace: Trace, clusters: Clusters, min_count: int) -> _Types:
        group_of_sequence = np.where(clusters.of_sequence >= 0, np.append(clusters.group, 0)[clusters.of_sequence], 0)
        return cls(group_of_sequence, occurrences(trace, group_of_sequence, clusters.n_groups), min_count)

    def rows(self, sequence: np.ndarray, token_id: np.ndarray) -> np.ndarray:
        """Return the row of each token's type [token], -1 if it is too rare."""
        return self.row_of[self.group_of_sequence[sequence], token_id]

    def best(self, trace: Trace, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the most chosen expert of each type [layer, row], and the share of its occurrences."""
        n_rows = len(self.n)
        table = np.zeros((len(layers), trace.n_experts * n_rows), np.int32)
        for columns in trace.blocks("sequence", "token_id", "expert_id"):
            row = self.rows(columns["sequence"], columns["token_id"])
            known = np.flatnonzero(row >= 0)
            for i, ids in enumerate(columns["expert_id"][known][:, layers].transpose(1, 2, 0)):
                for of_slot in ids:
                    np.add.at(table[i], of_slot * np.int64(n_rows) + row[known], np.int32(1))
        table = reduced(trace, table).reshape(len(layers), trace.n_experts, n_rows)
        return table.argmax(1).astype(id_dtype(trace.n_experts)), table.max(1) / self.n

    def mean(self, share: np.ndarray) -> np.ndarray:
        """Return the mean over types of shares [layer, row] for each group [layer, group]."""
        n_groups = len(self.n_of_group)
        sums = np.stack([np.bincount(self.group, weights=row, minlength=n_groups) for row in share])
        return sums / np.maximum(self.n_of_group, 1)


def _folds(trace: Trace, n_numbers: int, seed: int) -> tuple[np.ndarray, int]:
    """Return the fold of each sequence number, assigned at random by document, and the number of folds."""
    tokens = np.zeros(n_numbers, np.int64)
    for columns in trace.blocks("sequence"):
        tokens += np.bincount(columns["sequence"], minlength=n_numbers)
    present = reduced(trace, tokens)[trace.sequences.index] > 0
    document, ids = pd.factorize(trace.sequences[trace.cluster][present])
    if len(ids) < 2:
        raise BadInput(
            f"Cannot compute predictability: the trace has {len(ids)} document with tokens, so none can be held out. "
            "Record at least two documents, or pass document_id in the sequences.",
            argument="documents",
            value=len(ids),
        )
    n_folds = min(_FOLDS, len(ids))
    fold = np.zeros(n_numbers, np.int64)
    fold[trace.sequences.index[present]] = (np.random.default_rng(seed).permutation(len(ids)) % n_folds)[document]
    return fold, n_folds


def _joined(parts: list[Counts], name: str) -> Counts:
    """Join counts of groups of layers, concatenating one total along the layers."""
    total = np.concatenate([part.totals[name] for part in parts], axis=1)
    return replace(parts[0], totals={name: total})
