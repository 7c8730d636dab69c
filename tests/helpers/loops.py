"""Formulas of the statistics in nested loops over plain arrays, and the interval written out draw by draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats as scipy_stats

import mixlens as ml
from helpers.traces import Made


def interval(
    documents: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    sizes: Sequence[float],
    bootstrap: ml.stats.Bootstrap,
    stream: int,
    floor: float | None = None,
    *,
    proportion: bool = False,
) -> tuple[float, float]:
    """Bounds of a statistic of the documents' sums, from draws by numpy and Student's t by scipy.

    Below 64 documents those of the jackknife; of a proportion of tokens, of which some are there and some are not,
    Korn and Graubard's.

    sizes   what each document has to say, for the effective number of documents
    stream  number of the group; each has draws of its own
    floor   smallest value of a statistic that is biased, whose bias is taken off twice
    """
    table, n = np.array(documents, float), len(documents)
    if sum(size > 0 for size in sizes) < 2:
        return math.nan, math.nan
    estimate = statistic(table.sum(0))
    drawn = np.random.default_rng([bootstrap.seed, stream]).integers(n, size=(bootstrap.replicates, n))
    replicates = np.array([statistic(table[rows].sum(0)) for rows in drawn])
    replicates = replicates[np.isfinite(replicates)]
    left_out = np.array([statistic(np.delete(table, one, 0).sum(0)) for one in range(n)])
    left_out = left_out[np.isfinite(left_out)]
    jackknife = math.sqrt((n - 1) * np.var(left_out))
    of_draws = math.sqrt(n / (n - 1)) * np.std(replicates)
    effective = max(sum(sizes) ** 2 / sum(size**2 for size in sizes), 1.01)
    t = scipy_stats.t.ppf((1 + bootstrap.level) / 2, max(effective - 1, 1))
    reach = math.sqrt(effective / (effective - 1)) * t
    if proportion:
        z = scipy_stats.norm.ppf((1 + bootstrap.level) / 2)
        tokens = min(estimate * (1 - estimate) / jackknife**2 * (z / reach) ** 2, sum(sizes))
        hits, tail = estimate * max(tokens, 1), (1 - bootstrap.level) / 2
        rest = max(tokens, 1) - hits
        return scipy_stats.beta.ppf(tail, hits, rest + 1), scipy_stats.beta.ppf(1 - tail, hits + 1, rest)
    if n < 64:
        centre = estimate if floor is None else estimate - (n - 1) * (left_out.mean() - estimate)
        low, high = centre - reach * jackknife, centre + reach * jackknife
        if floor is not None:
            low, high = max(low, floor), max(high, floor)
        return min(low, estimate), max(high, estimate)
    wider = min(max(jackknife / of_draws, 1), 1.5) if of_draws > 0 else 1
    tail = scipy_stats.norm.cdf(-wider * reach)
    low, high = np.quantile(replicates, [tail, 1 - tail])
    if floor is not None:
        bias = replicates.mean() - estimate
        low, high = max(low - 2 * bias, floor), max(high - 2 * bias, floor)
    return min(low, estimate), max(high, estimate)


def tokens_of(case: Made, group: str | None = None, column: str = "domain") -> list[int]:
    """Numbers of the tokens, of one group of the sequences or of all."""
    return [t for t in range(case.n_tokens) if group is None or case.of_tokens(column)[t] == group]


def softmax(logits: np.ndarray) -> list[float]:
    powers = [math.exp(float(z) - float(max(logits))) for z in logits]
    return [power / sum(powers) for power in powers]


def share(case: Made, place: int, expert: int, tokens: Sequence[int], slots: int) -> float:
    chosen = sum(int(case.expert_id[t, place, s]) == expert for t in tokens for s in range(slots))
    return chosen / (slots * len(tokens))


def pairs(case: Made, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Tokens and those that directly follow them in their sequence."""
    there = {(case.sequence[t], case.position[t]): t for t in tokens}
    return [(there[s, p - 1], t) for (s, p), t in there.items() if (s, p - 1) in there]


def of_experts(case: Made, place: int, t: int) -> set[int]:
    return {int(expert) for expert in case.expert_id[t, place]}


def entropy_bits(p: Sequence[float]) -> float:
    return -sum(x * math.log2(x) for x in p if x > 0)


def balance(case: Made, place: int, tokens: Sequence[int]) -> list[float]:
    n_e = [sum(expert in of_experts(case, place, t) for t in tokens) for expert in range(case.n_experts)]
    mean = sum(n_e) / case.n_experts
    spread = math.sqrt(sum((n - mean) ** 2 for n in n_e) / case.n_experts)
    p = [softmax(case.router_logits[t, place]) for t in tokens]
    mean_p = [sum(row[expert] for row in p) / len(tokens) for expert in range(case.n_experts)]
    switch = case.n_experts * sum(n / len(tokens) * q for n, q in zip(n_e, mean_p, strict=True))
    return [spread / mean, max(n_e) / mean, switch]


def confidence(case: Made, place: int, tokens: Sequence[int]) -> list[float]:
    """Means of ratios, not ratios of means."""
    sums = [0.0, 0.0, 0.0]
    for t in tokens:
        p = sorted(softmax(case.router_logits[t, place]), reverse=True)
        sums[0] += p[0]
        sums[1] += p[0] - p[1]
        sums[2] += float(case.weight[t, place, 1] / case.weight[t, place, 0]) if case.top_k > 1 else math.nan
    return [total / len(tokens) for total in sums]


def repeated(case: Made, place: int, tokens: Sequence[int]) -> list[float]:
    found = pairs(case, tokens)
    if not found:
        return [math.nan, math.nan]
    first = sum(case.expert_id[a, place, 0] == case.expert_id[b, place, 0] for a, b in found)
    either = sum(bool(of_experts(case, place, a) & of_experts(case, place, b)) for a, b in found)
    return [first / len(found), either / len(found)]


def together(case: Made, place: int, i: int, j: int, tokens: Sequence[int]) -> float:
    """P(j | i); NaN on the diagonal and where nobody chose i."""
    having = [t for t in tokens if i in of_experts(case, place, t)]
    if i == j or not having:
        return math.nan
    return sum(j in of_experts(case, place, t) for t in having) / len(having)


def moves(case: Made, here: int, there: int, tokens: Sequence[int]) -> np.ndarray:
    """Counts of first choices [i at place `here`, j at place `there`]."""
    found = np.zeros((case.n_experts, case.n_experts))
    for t in tokens:
        found[case.expert_id[t, here, 0], case.expert_id[t, there, 0]] += 1
    return found


def information_bits(joint: np.ndarray) -> float:
    p, bits = joint / joint.sum(), 0.0
    for i in range(p.shape[0]):
        for j in range(p.shape[1]):
            if p[i, j]:
                bits += p[i, j] * math.log2(p[i, j] / (p[i].sum() * p[:, j].sum()))
    return bits
