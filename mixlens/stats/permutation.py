"""Tests that permute documents between groups, in which they may be fewer, shorter or more variable than elsewhere.

A difference of groups of short documents is large by chance. Permuted groups have documents of all lengths, so that
plain differences do not compare; those in standard errors do, since these come from the documents of each group
(Janssen 1997). Few documents may happen to vary little; so a difference has to stand out as well where every group
varies at least as documents of such lengths usually do.
"""

from __future__ import annotations

import numpy as np

PERMUTATIONS = 1999
_SEED = 0


def permutations(n_a: int, n_b: int, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the pooled documents [permutation, n_a + n_b] in both groups; the first is as it was."""
    rng = np.random.default_rng(_SEED)
    in_a = np.zeros((1 + PERMUTATIONS, n_a + n_b), bool)
    in_a[0, :n_a] = True
    if paired:
        stays = rng.integers(2, size=(PERMUTATIONS, n_a)).astype(bool)
        in_a[1:] = np.concatenate([stays, ~stays], axis=1)
    else:
        in_a[1:] = rng.permuted(np.broadcast_to(in_a[0], in_a[1:].shape), axis=1)
    return in_a.astype(float), (~in_a).astype(float)


def share_as_far(far: np.ndarray) -> np.ndarray:
    """p [...]: the share of permutations [..., permutation], the first of them what was seen, that lie as far out."""
    with np.errstate(invalid="ignore"):
        return (far >= far[..., :1] * (1 - 1e-9)).mean(-1)


def variances(influence: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Variance of the statistic of a group, linear in the influence of its documents [..., document].

    Two of them [2, ..., resample]: as its own documents vary, and at least as documents of their lengths usually do. A
    single document varies as usual.

    influence  what each document adds to the statistic of all of them
    weights    [resample, document], 1 for those in the group
    """
    n, own, squares = weights.sum(-1), weights @ tokens, weights @ tokens**2
    alone, together = _of_length(influence, tokens)
    usual = alone[..., None] * own
    usual += together[..., None] * squares
    # sum (influence - mean tokens)^2; in place, since these arrays are large.
    mean = influence @ (weights.T / own)
    within = mean * squares
    within -= (2 * influence * tokens) @ weights.T
    within *= mean
    within += influence**2 @ weights.T
    np.maximum(within, 0, out=within)
    within *= n / np.maximum(n - 1, 1)
    np.copyto(within, usual, where=n <= 1)
    both = np.stack([within, np.maximum(within, usual, out=usual)])
    both *= (tokens.sum() / own) ** 2
    return both


def _of_length(influence: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) [...], so that n tokens have a squared influence of a n + b n^2: they vary alone, and with their document.

    Least squares for the squared influence of a token, neither below 0.
    """
    n, from_mean = len(tokens), tokens - tokens.mean()
    of_token = influence**2 / tokens * n / max(n - 1, 1)
    slope = of_token @ from_mean / max(float(from_mean @ from_mean), 1e-12)
    together = np.clip(slope, 0, of_token @ tokens / (tokens @ tokens))
    return np.maximum(of_token.mean(-1) - together * tokens.mean(), 0), together


def without_each(n: int, total: int, start: int) -> np.ndarray:
    """Weights [left out, total] of the n documents from `start` on, each left out once; all others 0."""
    weights = np.zeros((n, total))
    weights[:, start : start + n] = 1 - np.eye(n)
    return weights
