"""Permutation tests between groups of documents that may differ in number, length or variance.

Groups of short documents differ strongly by chance. Permuted groups mix all lengths, so plain differences are not
comparable; differences in standard errors are, because these come from the documents of each group (Janssen 1997).
Since few documents may vary little by chance, a difference must also stand out if every group varies at least as much
as documents of such lengths usually do.
"""

from __future__ import annotations

import numpy as np

PERMUTATIONS = 1999
_SEED = 0


def permutations(n_a: int, n_b: int, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return weights of the pooled documents [permutation, n_a + n_b] in both groups; the first row is the original."""
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
    """Return p [...]: the share of permutations [..., permutation] as extreme as the first, the observed one."""
    with np.errstate(invalid="ignore"):
        return (far >= far[..., :1] * (1 - 1e-9)).mean(-1)


def variances(influence: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return variances of a group's statistic, linear in the influence of its documents [..., document].

    Two of them [2, ..., resample]: by the variation of its own documents, and at least by the usual variation of
    documents of their lengths, which a single document always gets.

      influence  of each document on the statistic over all documents
      weights    [resample, document], 1 for documents in the group
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
    """Fit (a, b) [...] so that n tokens have a squared influence of a n + b n^2: independent and shared variation.

    Least squares for the squared influence per token, with both terms nonnegative.
    """
    n, from_mean = len(tokens), tokens - tokens.mean()
    of_token = influence**2 / tokens * n / max(n - 1, 1)
    slope = of_token @ from_mean / max(float(from_mean @ from_mean), 1e-12)
    together = np.clip(slope, 0, of_token @ tokens / (tokens @ tokens))
    return np.maximum(of_token.mean(-1) - together * tokens.mean(), 0), together


def without_each(n: int, total: int, start: int) -> np.ndarray:
    """Return weights [left out, total] of n documents from `start` on, leaving out each once; all others 0."""
    weights = np.zeros((n, total))
    weights[:, start : start + n] = 1 - np.eye(n)
    return weights
