"""Placements of experts on devices: DeepSeek's load balancer, and enumeration of all placements."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import comb, prod

import numpy as np

_MOST_PLACEMENTS = 5000  # enumerated placements of the experts of a layer


def eplb(load: np.ndarray, ranks: int, redundant: int, nodes: int = 1, groups: int = 1) -> np.ndarray:
    """Return the expert of each slot [expert + copy], device by device, by DeepSeek's EPLB from loads [expert]."""
    if groups % nodes:
        nodes = groups = 1
    size = len(load) // groups
    node, rank = _packed(load.reshape(groups, size).sum(-1), nodes)
    places = (len(load) + redundant) // nodes
    found = []
    for at in range(nodes):
        inside = np.flatnonzero(node == at)
        experts = (inside[np.argsort(rank[inside])][:, None] * size + np.arange(size)).ravel()
        of, copies = list(range(len(experts))), np.ones(len(experts), np.int64)
        while len(of) < places:
            of.append(int(np.argmax(load[experts] / copies)))
            copies[of[-1]] += 1
        device, place = _packed((load[experts] / copies)[of], ranks // nodes)
        found.append(experts[np.array(of)[np.lexsort((place, device))]])
    return np.concatenate(found)


def _packed(load: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack and place within it of each item, as many in each: the largest first, to the lightest pack with room."""
    room = len(load) // packs
    if room == 1:
        return np.arange(packs), np.zeros(packs, np.int64)
    pack, place = np.zeros((2, len(load)), np.int64)
    weight, items = np.zeros(packs), np.zeros(packs, np.int64)
    for item in np.argsort(-load, kind="stable"):
        pack[item] = lightest = int(np.argmin(np.where(items < room, weight, np.inf)))
        place[item] = items[lightest]
        weight[lightest] += load[item]
        items[lightest] += 1
    return pack, place


def shares(physical: np.ndarray, n_experts: int, devices: int) -> np.ndarray:
    """Return the share of each expert's tokens on each device [expert, device], from the expert of each slot."""
    found = np.zeros((n_experts, devices))
    np.add.at(found, (physical, np.arange(len(physical)) * devices // len(physical)), 1.0)
    return found / found.sum(-1, keepdims=True)


def every_placement(n_experts: int, ranks: int) -> Iterator[np.ndarray]:
    """Yield every placement of experts on devices [expert, device]; nothing if there are too many."""
    size = n_experts // ranks
    ways = prod(comb(size * (i + 1) - 1, size - 1) for i in range(ranks))
    if ways > _MOST_PLACEMENTS:
        return

    def shared_out(left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not left:
            yield ()
        for others in combinations(left[1:], size - 1) if left else ():
            inside = (left[0], *others)
            for rest in shared_out(tuple(one for one in left if one not in inside)):
                yield (*inside, *rest)

    for physical in shared_out(tuple(range(n_experts))):
        yield shares(np.array(physical), n_experts, ranks)
