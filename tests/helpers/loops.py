"""Formulas of the statistics in nested loops over plain arrays, and intervals by leaving out each document in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats as scipy_stats

from helpers.traces import Made


def interval(
    documents: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    sizes: Sequence[float],
    level: float,
    kind: str,
    floor: float = -math.inf,
) -> tuple[float, float]:
    """Bounds of a statistic of the documents' sums from leaving out each, with scipy's distributions.

    sizes  what each document has below the line, or its tokens
    kind   share, mean, difference (whose documents are [above, below]) or smooth
    """
    tail = (1 - level) / 2
    if sum(size > 0 for size in sizes) < 2:
        return math.nan, math.nan
    estimate, error, bias, freedom = jackknife(documents, statistic, sizes)
    reach = scipy_stats.t.ppf(1 - tail, freedom) * error
    if kind == "share":
        z = scipy_stats.norm.ppf(1 - tail)
        tokens = effective_number(sizes)
        if 0 < estimate < 1 and error > 0:
            tokens = estimate * (1 - estimate) * (z / reach) ** 2
        tokens = max(tokens, min(1, sum(sizes)))
        hits, rest = estimate * tokens, (1 - estimate) * tokens
        one = 1 - min(tokens / sum(sizes), 1) / 2  # Clopper and Pearson's for units, Jeffreys' for single tokens
        low = 0.0 if estimate == 0 else scipy_stats.beta.ppf(tail, hits + 1 - one, rest + one)
        return low, 1.0 if estimate == 1 else scipy_stats.beta.ppf(1 - tail, hits + one, rest + 1 - one)
    if kind == "mean":
        return gamma_bounds(estimate, reach, tail, 3 if sum(size > 0 for size in sizes) < 20 else 2)
    if kind == "difference":
        parts, more = [], min(1, 5 / effective_number(sizes))
        for sign in (1, -1):
            part = [np.array([max(sign * above, 0.0), below]) for above, below in documents]
            mean, own, _, df = jackknife(part, statistic, sizes)
            parts.append((mean, own, *gamma_bounds(mean, scipy_stats.t.ppf(1 - tail, df) * own, tail, more)))
        (p, of_p, p_low, p_high), (m, of_m, m_low, m_high) = parts
        r = (of_p**2 + of_m**2 - error**2) / (2 * of_p * of_m) if of_p * of_m > 0 else 0
        below = math.sqrt(max((p - p_low) ** 2 + (m_high - m) ** 2 - 2 * r * (p - p_low) * (m_high - m), reach**2))
        above = math.sqrt(max((p_high - p) ** 2 + (m - m_low) ** 2 - 2 * r * (p_high - p) * (m - m_low), reach**2))
        return estimate - below, estimate + above
    low, high = max(estimate - bias - reach, floor), max(estimate - bias + reach, floor)
    return min(low, estimate), max(high, estimate)


def jackknife(
    documents: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float], sizes: Sequence[float]
) -> tuple[float, float, float, float]:
    """Estimate, standard error, bias and degrees of freedom."""
    table, n = np.array(documents, float), len(documents)
    estimate = statistic(table.sum(0))
    left_out = [statistic(np.delete(table, one, 0).sum(0)) for one in range(n)]
    left_out = [value for value in left_out if math.isfinite(value)]
    mean = sum(left_out) / len(left_out)
    squares = [(value - mean) ** 2 for value in left_out]
    effective = effective_number(sizes)
    error = (n - 1) / n * math.sqrt(effective / (effective - 1) * sum(squares))
    freedom = effective - 1
    if sum(squares) > 1e-24:
        excess = n * sum(square**2 for square in squares) / sum(squares) ** 2 - 3
        freedom = min(freedom, 2 * n / (max(excess, 0) + 2 * n / (n - 1)))
    return estimate, error, (n - 1) * (mean - estimate), max(freedom, 1)


def gamma_bounds(mean: float, reach: float, tail: float, more: float) -> tuple[float, float]:
    if reach < 1e-12:
        return mean, mean
    events = (mean * scipy_stats.norm.ppf(1 - tail) / reach) ** 2
    low, high = scipy_stats.gamma.ppf(tail, events), scipy_stats.gamma.ppf(1 - tail, events + more)
    return low * mean / events, high * mean / events


def effective_number(sizes: Sequence[float]) -> float:
    return max(sum(sizes) ** 2 / sum(size**2 for size in sizes), 1.01)


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
