"""Router probabilities, a few tokens at a time: what fits into a core's cache costs a third of what does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixlens.core.threads import in_threads

_TILE = 1024

# Tokens a block for passes over router logits, which take E times the memory of ids: 16 MB for 32 layers of 8.
BLOCK_OF_LOGITS = 16_384


def softmax_tiles(take: Callable[..., None], *logits: np.ndarray) -> None:
    """Call ``take(tokens, z, exp z, Z)`` for about a thousand tokens of logits [token, layer, expert] at a time.

    On all cores; of the logits of several models, ``take(tokens, z, exp z, Z, z, exp z, Z ...)``.

    z [layer, expert, token] are logits minus their largest, Z [layer, token] the sum of exp z, so that p = exp z / Z.
    Tokens come last, so that every step runs over them in order. Exponents stop at -80 (1e-35): an expert masked
    with -inf has probability 0, without NaN in p log p.
    """

    def tile(start: int) -> None:
        tokens = slice(start, start + _TILE)
        parts: list[np.ndarray] = []
        for of_model in logits:
            z = np.ascontiguousarray(of_model[tokens].transpose(1, 2, 0), np.float32)
            z -= z.max(1, keepdims=True)
            np.maximum(z, -80, out=z)
            exponential = np.exp(z)
            parts += [z, exponential, exponential.sum(1)]
        take(tokens, *parts)

    in_threads(tile, range(0, len(logits[0]), _TILE))


def entropy_bits(z: np.ndarray, exponential: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Entropy in bits [layer, token] of what `softmax_tiles` gives: log Z - sum_e p_e z_e."""
    return (np.log(total) - (exponential * z).sum(1) / total) / np.float32(np.log(2))


def second_largest(z: np.ndarray) -> np.ndarray:
    """Second largest over experts [layer, token]; equal to the largest where that comes twice."""
    largest, second = z[:, 0].copy(), np.full_like(z[:, 0], -np.inf)
    for row in np.moveaxis(z, 1, 0)[1:]:
        np.maximum(second, np.minimum(largest, row), out=second)
        np.maximum(largest, row, out=largest)
    return second
