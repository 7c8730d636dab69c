"""Structure of choices: along the text, within a token, and between layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Share, Smooth
from mixlens.core.threads import in_threads
from mixlens.errors import BadInput
from mixlens.stats.clusters import By, Clusters
from mixlens.stats.counts import Block, Reading, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.published import JIANG, OLMOE
from mixlens.stats.summaries import described, joined, layer_by_layer, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def repetition(
    trace: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute how often consecutive tokens choose the same expert.

    first
        share of consecutive pairs of tokens with the same strongest expert; uniform 1/E.
    either
        share of pairs that have an expert in common among their k; uniform 1 - C(E-k, k) / C(E, k).

    Pairs lie within one sequence, without gaps (Jiang et al. 2024, Table 5, "first" and "first or second choice").

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; position.
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high, and p, q, survives against uniform routing ``[*by, layer, choice]``;
        n (pairs) ``[*by]``; NaN without a pair.

    Raises
    ------
    BadInput
        If `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.repetition(trace)["estimate"].dims
    ('layer', 'choice')
    """
    trace = clustered(trace, cluster)
    require(trace, "repetition", "expert_id", "position", bootstrap=bootstrap)

    e, k = trace.n_experts, trace.top_k

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        follows = block.follows()
        totals["pairs"][block.clusters] += block.sums(follows)

        def add_layer(layer: int, ids: np.ndarray) -> None:
            repeated = np.zeros((2, block.n_tokens), bool)
            np.equal(ids[0, 1:], ids[0, :-1], out=repeated[0, 1:])
            repeated[1] = repeated[0]
            for a, b in product(range(k), repeat=2):
                repeated[1, 1:] |= ids[a, 1:] == ids[b, :-1]
            repeated &= follows
            totals["repeated"][block.clusters, layer] += block.sums(repeated)

        block.each_layer("expert_id", add_layer)

    uniform = [1 / e, 1 - comb(e - k, k) / comb(e, k)]
    shapes = {"repeated": (trace.n_layers, 2), "pairs": ()}
    blocks = Reading(("sequence", "position", "expert_id"))
    counts = count(trace, by, shapes, blocks, add)
    data = summarise(
        counts,
        lambda sums: Share(sums["repeated"], sums["n"]),
        {"choice": ["first", "either"]},
        bootstrap,
        size=(counts.totals.pop("pairs"), ()),
        null=np.array(uniform),
    )
    return described(
        data, trace, bootstrap,
        statistic="repetition", unit="fraction", uniform=uniform,
        formula="first: P(e1_t = e1_{t-1}); either: P(S_t and S_{t-1} have an expert in common)",
        source=f"{JIANG}, Table 5",
    )  # fmt: skip


def coactivation(
    trace: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the probability that a token that chose expert i also chose expert j.

    P(j | i) = n(i and j) / n(i), over all unordered pairs of slots (Muennighoff et al. 2024, eq. 6). Each row sums to
    k - 1; uniform routing gives (k - 1) / (E - 1).

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot].
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high, and p, q, survives against uniform routing ``[*by, layer, expert,
        expert_j]``; n (tokens that chose i) ``[*by, layer, expert]``; NaN on the diagonal and where expert i was
        never chosen.

    Raises
    ------
    BadInput
        If the trace has one expert per token, or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.coactivation(trace)["estimate"].dims
    ('layer', 'expert', 'expert_j')
    """
    trace = clustered(trace, cluster)
    require(trace, "coactivation", "expert_id", bootstrap=bootstrap)
    if trace.top_k < 2:
        raise BadInput(
            "Cannot compute coactivation: this trace has one expert per token, so no two are chosen together. Use "
            "transitions or repetition.",
            argument="top_k",
            value=trace.top_k,
        )
    e, k = trace.n_experts, trace.top_k

    first, second = np.triu_indices(k, 1)
    others = ~np.eye(e, dtype=bool)
    clusters = Clusters.of(trace, by, {"together": (trace.n_layers, e, e)})
    parts = []
    for layers in layer_by_layer(clusters, trace.n_layers, e * e):

        def add(block: Block, totals: dict[str, np.ndarray], layers: slice = layers) -> None:
            def add_layer(layer: int, ids: np.ndarray) -> None:
                # Count all pairs of slots at once: the counts of a layer far outnumber the additions of one pair.
                found = block.count(_joint(ids[first], ids[second], e), e * e)
                totals["together"][block.clusters, layer] += found.reshape(-1, e, e)

            block.each_layer("expert_id", add_layer, layers)

        shapes = {"together": (layers.stop - layers.start, e, e)}
        counts = count(trace, clusters, shapes, Reading(("sequence", "expert_id")), add, dtype=np.uint32)
        counts = replace(counts, layers=trace.layers[layers])
        together = counts.totals["together"]
        for of_layer in together.swapaxes(0, 1):
            of_layer += of_layer.swapaxes(-1, -2).copy()
        parts.append(
            summarise(
                counts,
                lambda sums: Share(sums["together"], sums["together"].sum(-2, keepdims=True) / (k - 1)),
                {"expert": range(e), "expert_j": range(e)},
                bootstrap,
                size=(together.sum(-1) / (k - 1), ("layer", "expert")),
                apart=2,
                null=np.where(others, (k - 1) / (e - 1), np.nan),
                adjust=False,
            )
        )
    data = joined(parts, bootstrap.level)
    pairs = xr.DataArray(others, dims=("expert", "expert_j"))
    data = data.assign({name: data[name].where(pairs) for name in ("estimate", "ci_low", "ci_high")})
    return described(
        data, trace, bootstrap,
        statistic="coactivation", unit="fraction", uniform=(k - 1) / (e - 1), formula="P(j | i) = N_ij / N_i",
        source=f"{OLMOE}, eq. 6",
    )  # fmt: skip


def transitions(
    trace: Trace, *, by: By = None, gap: int = 1, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the transition probabilities of first choices between layers `gap` apart.

    P(first choice at layer l + gap = j | first choice at l = i) = n(i, j) / n(i), and the mutual information of the
    two choices, sum_ij p_ij log2 (p_ij / (p_i p_j)), 0 for independent layers and at most log2(E).

    The estimate of the mutual information is the plain one, biased upwards in small samples. Its interval is for the
    true value: it is corrected for the bias, and extended to the estimate if necessary.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot].
    by : By, optional
        Column or columns of the sequences to group by.
    gap : int, optional
        Distance in layers.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high, and p, q, survives against uniform routing ``[*by, layer, expert,
        expert_j]``; n (tokens whose first choice is i) ``[*by, layer, expert]``; mi_bits, mi_ci_low, mi_ci_high
        ``[*by, layer]``; layer is the one left; NaN if expert i was never chosen first.

    Raises
    ------
    BadInput
        If no two layers of the trace are `gap` apart, or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.transitions(trace)["estimate"].dims
    ('layer', 'expert', 'expert_j')
    """
    trace = clustered(trace, cluster)
    require(trace, "transitions", "expert_id", bootstrap=bootstrap)
    index = {int(layer): i for i, layer in enumerate(trace.layers)}
    here = [layer for layer in index if layer + gap in index]
    if gap < 1 or not here:
        raise BadInput(
            f"Cannot compute transitions over {gap} layers: the trace has the layers {', '.join(map(str, index))}. "
            "Pass a gap of at least 1 that lies between two of them.",
            argument="gap",
            value=gap,
        )
    e = trace.n_experts

    clusters = Clusters.of(trace, by, {"moves": (len(here), e, e)})
    parts = []
    for layers in layer_by_layer(clusters, len(here), e * e):
        left = here[layers]

        def add(block: Block, totals: dict[str, np.ndarray], left: list[int] = left) -> None:
            def add_layer(i: int) -> None:
                before, after = (block["expert_id"][:, index[layer], 0] for layer in (left[i], left[i] + gap))
                found = block.count(_joint(before, after, e), e * e)
                totals["moves"][block.clusters, i] += found.reshape(-1, e, e)

            in_threads(add_layer, range(len(left)))

        shapes = {"moves": (len(left), e, e)}
        counts = count(trace, clusters, shapes, Reading(("sequence", "expert_id")), add, dtype=np.uint32)
        counts = replace(counts, layers=np.array(left))
        part = summarise(
            counts,
            lambda sums: Share(sums["moves"], sums["moves"].sum(-2, keepdims=True)),
            {"expert": range(e), "expert_j": range(e)},
            bootstrap,
            size=(counts.totals["moves"].sum(-1), ("layer", "expert")),
            apart=2,
            null=1 / e,
            adjust=False,
        )
        information = summarise(
            counts,
            lambda sums: Smooth(mutual_information_bits(sums["moves"]), floor=0.0, fewest=20),
            {},
            bootstrap,
        )
        part = part.assign(
            mi_bits=information["estimate"], mi_ci_low=information["ci_low"], mi_ci_high=information["ci_high"]
        )
        part.attrs["interval"] += f"; mi: {information.attrs['interval']}"
        parts.append(part)
    data = joined(parts, bootstrap.level)
    return described(
        data, trace, bootstrap,
        statistic="transitions", unit="fraction", uniform=1 / e, gap=gap,
        formula="P(j | i) = N(e1_l = i, e1_{l+gap} = j) / N(e1_l = i); I = sum_ij p_ij log2(p_ij / (p_i p_j))",
        source="Markov transition matrix of first choices; Shannon 1948",
    )  # fmt: skip


def mutual_information_bits(joint: np.ndarray) -> np.ndarray:
    """Return the mutual information of two choices from joint counts [..., i, j, resample], in bits [..., resample].

    H(i) + H(j) - H(i, j), which needs no products of the margins. NaN if all counts are 0.
    """
    total = joint.sum((-3, -2))
    rows, columns = joint.sum(-2), joint.sum(-3)
    nats = _x_log_x(joint).sum((-3, -2)) - _x_log_x(rows).sum(-2) - _x_log_x(columns).sum(-2) + _x_log_x(total)
    with np.errstate(invalid="ignore"):
        return np.maximum(nats / total, 0) / np.log(2)


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1))


def _joint(i: np.ndarray, j: np.ndarray, n: int) -> np.ndarray:
    """Return the joint code i * n + j."""
    return np.multiply(i, n, dtype=np.int32) + j
