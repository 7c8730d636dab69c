"""Router probabilities, computed in tiles that fit into the CPU cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixlens.core.threads import in_threads

_TILE = 1024

# Tokens per block in passes over router logits, which take E times the memory of ids: 16 MB for 32 layers of 8.
BLOCK_OF_LOGITS = 16_384


def softmax_tiles(take: Callable[..., None], *logits: np.ndarray) -> None:
    """Call ``take(tokens, z, exp z, Z)`` on tiles of about a thousand tokens of logits [token, layer, expert].

    Runs on all cores; with logits of several models, calls ``take(tokens, z, exp z, Z, z, exp z, Z ...)``.

    z [layer, expert, token] are logits minus their maximum, Z [layer, token] the sum of exp z, so that p = exp z / Z.
    Tokens come last for sequential access. Exponents are clipped at -80 (1e-35): an expert masked with -inf has
    probability 0, without NaN in p log p.
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
    """Return the entropy in bits [layer, token] from the parts of `softmax_tiles`: log Z - sum_e p_e z_e."""
    return (np.log(total) - (exponential * z).sum(1) / total) / np.float32(np.log(2))


def second_largest(z: np.ndarray) -> np.ndarray:
    """Return the second largest value over experts [layer, token]; equal to the largest for ties."""
    largest, second = z[:, 0].copy(), np.full_like(z[:, 0], -np.inf)
    for row in np.moveaxis(z, 1, 0)[1:]:
        np.maximum(second, np.minimum(largest, row), out=second)
        np.maximum(largest, row, out=largest)
    return second
