"""Replay of expert caches over the tokens of a trace.

Every sequence begins with an empty cache. The experts of a token are looked up and loaded together, and do not evict
each other; they count as used in the order of their slots. All functions take

ids    integers [token, slot] of one layer, or [token, layer, slot]
first  [token] place of the first token of its sequence
sizes  numbers of experts that a cache holds, each at least the number of slots

and return the number of cache hits of each token, uint8 [size, token] or [size, token, layer].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

_GONE = np.iinfo(np.int64).max  # key of an expert that is not cached or must stay
_MOST = 2**23  # numbers in memory at a time


def filled(
    ids: np.ndarray, first: np.ndarray, n_experts: int, sizes: Sequence[int], *, pooled: bool
) -> Callable[[int], np.ndarray]:
    """Return whether the cache is full when a token arrives [size, token], by layer index; a pool fills as a whole.

    ids  [token, layer, slot]
    """
    seen, room = _used_before(ids, first, n_experts), np.asarray(sizes)[:, None]
    if pooled:
        whole = seen.sum(0, dtype=np.int64) >= room * len(seen)
        return lambda layer: whole
    return lambda layer: seen[layer] >= room


def lru(ids: np.ndarray, first: np.ndarray, n_experts: int, sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """The least recently used leaves. One pass serves all sizes: an expert is held by those above its stack distance,
    the number of experts used since it was (Mattson et al. 1970). Sizes may differ by sequence [size, token].
    """
    found = np.zeros((len(sizes), len(ids)), np.uint8)
    room = np.broadcast_to(np.asarray(sizes).reshape(len(sizes), -1), found.shape)
    for part, last in _last_uses(ids, first, n_experts):
        for chosen in ids[part].T:
            own = last[chosen, np.arange(len(chosen))]
            distance = np.where(own > 0, 0, n_experts).astype(np.int32)
            for other in last:
                distance += other > own
            for row, size in zip(found, room, strict=True):
                row[part] += distance < size[part]
    return found


def prefetched(
    ids: np.ndarray, ahead: np.ndarray | None, first: np.ndarray, n_experts: int, sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Experts of one layer at hand and loaded [size, token] by lru, where those `ahead` [token, slot] come before."""
    k = ids.shape[1]
    if ahead is None:
        found = lru(ids, first, n_experts, sizes)
        return found, k - found
    both = np.stack([ahead, ids], axis=1).reshape(-1, k)
    found = lru(both, np.repeat(2 * first, 2), n_experts, sizes)
    return found[:, 1::2], 2 * k - found[:, 0::2] - found[:, 1::2]


def replayed(
    ids: np.ndarray, first: np.ndarray, n_experts: int, sizes: Sequence[int], policy: Literal["lfu", "optimum"]
) -> np.ndarray:
    """Count hits with eviction of the expert with the smallest key, for all sequences, layers and sizes at once.

    lfu      uses since it was loaded; ties go to the one used longest ago
    optimum  the one needed last, which no policy beats (Belady 1966)
    """
    n_layers, k = ids.shape[1:]
    found = np.zeros((len(sizes), len(ids), n_layers), np.uint8)
    needed = _next_uses(ids, first, n_experts) if policy == "optimum" else ids
    room = np.asarray(sizes)[:, None] - k
    for starts, lengths in _together(first, len(sizes) * n_layers * n_experts):
        lanes = len(starts) * n_layers
        key = np.full(len(sizes) * lanes * n_experts, _GONE)
        by_lane = key.reshape(len(sizes), lanes, n_experts)
        held = np.zeros((len(sizes), lanes), np.int64)
        base = np.arange(len(sizes) * lanes).reshape(len(sizes), lanes) * n_experts
        for step, active in enumerate(_active(lengths)):
            tokens = starts[:active] + step
            n = active * n_layers
            place = base[:, :n, None] + ids[tokens].reshape(n, k)
            before = key[place]
            there = before != _GONE
            hits = there.sum(-1)
            found[:, tokens] = hits.reshape(len(sizes), len(tokens), n_layers)
            key[place] = _GONE
            others = held[:, :n] - hits
            while (over := others > room).any():
                victim = by_lane[:, :n].argmin(-1)
                key[(base[:, :n] + victim)[over]] = _GONE
                others -= over
            if policy == "optimum":
                key[place] = -needed[tokens].reshape(n, k)
            else:
                uses = np.where(there, before >> 40, 0) + 1
                key[place] = (uses << 40) + step * k + np.arange(k)
            held[:, :n] = others + k
    return found


def least_stale(ids: np.ndarray, first: np.ndarray, n_experts: int, sizes: Sequence[int]) -> np.ndarray:
    """Count hits in one pool of size x layers that uses the known order of layers.

    After Least-Stale (Hoang et al. 2026, arXiv:2602.03921). The turn of the layer at hand comes last, and it holds as
    many experts as a token uses, so that what leaves is always its own: a layer keeps the places that it had when the
    pool was full, and is an lru of that size.
    """
    n_layers, k = ids.shape[1:]
    seen = _used_before(ids, first, n_experts)
    pool = seen.sum(0, dtype=np.int64)
    starts, sequence = np.unique(first, return_inverse=True)
    places = np.zeros((len(sizes), n_layers, len(starts)), np.int64)
    for of_size, size in zip(places, sizes, strict=True):
        last = starts + np.add.reduceat(pool < size * n_layers, starts, dtype=np.int64) - 1  # finds room in the pool
        after = np.minimum(last + 1, len(ids) - 1)
        new = np.where(first[after] == first[last], seen[:, after] - seen[:, last], k).astype(np.int64)
        room = size * n_layers - pool[last] - (np.cumsum(new, axis=0) - new)
        of_size[:] = np.minimum(seen[:, last] + np.clip(room, 0, new), n_experts)
    each = [lru(ids[:, i], first, n_experts, places[:, i][:, sequence]) for i in range(n_layers)]
    return np.stack(each, axis=-1)


def _used_before(ids: np.ndarray, first: np.ndarray, n_experts: int) -> np.ndarray:
    """How many experts of a layer the sequence used before each token, uint16 [layer, token]."""
    sequence, token = np.unique(first, return_inverse=True)[1], np.arange(len(ids))

    def of_layer(layer: int) -> np.ndarray:
        first_use = np.full((int(sequence.max(initial=-1)) + 1) * n_experts, len(ids))
        code = sequence[:, None] * n_experts + ids[:, layer]
        first_use[code[::-1].ravel()] = np.repeat(token[::-1], ids.shape[2])  # of several the last one written stays
        used = np.cumsum(np.bincount(first_use, minlength=len(ids) + 1))[:-1]
        before = np.append(0, used[:-1])
        return (before - before[first]).astype(np.uint16)

    return np.stack([of_layer(layer) for layer in range(ids.shape[1])])


def _last_uses(ids: np.ndarray, first: np.ndarray, n_experts: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of tokens, and when their sequence used each expert before them [expert, token]; 0 for never."""
    n, k = ids.shape
    dtype = np.int32 if n * k < 2**31 - 1 else np.int64
    carried = np.zeros(n_experts, dtype)
    for start in range(0, n, max(1, _MOST // n_experts)):
        part = slice(start, min(n, start + max(1, _MOST // n_experts)))
        of_part = np.arange(part.stop - start)
        last = np.zeros((n_experts, len(of_part) + 1), dtype)
        last[:, 0] = carried
        last[ids[part], of_part[:, None] + 1] = (start + of_part)[:, None] * k + np.arange(k) + 1
        np.maximum.accumulate(last, axis=1, out=last)
        carried, before = last[:, -1].copy(), last[:, :-1]
        before[before <= first[part] * k] = 0
        yield part, before


def _next_uses(ids: np.ndarray, first: np.ndarray, n_experts: int) -> np.ndarray:
    """Return the next token in the sequence that uses the expert [token, layer, slot]; the number of tokens if none."""
    n, n_layers, k = ids.shape
    found = np.full((n_layers, n * k), n, np.int64)
    for layer, out in enumerate(found):
        user = (first[:, None] * n_experts + ids[:, layer]).ravel()
        order = np.argsort(user, kind="stable")
        again = np.diff(user[order]) == 0
        out[order[:-1][again]] = order[1:][again] // k
    return found.reshape(n_layers, n, k).transpose(1, 0, 2)


def _together(first: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield first tokens and lengths of sequences, longest first, in batches that fit with `size` numbers each."""
    starts, lengths = np.unique(first, return_counts=True)
    order = np.argsort(-lengths, kind="stable")
    step = max(1, _MOST // size)
    for at in range(0, len(order), step):
        yield starts[order[at : at + step]], lengths[order[at : at + step]]


def _active(lengths: np.ndarray) -> list[int]:
    """Return the number of sequences, longest first, that have a token at each step [step]."""
    return (len(lengths) - np.searchsorted(lengths[::-1], np.arange(lengths[0]), side="right")).tolist()
