"""How alike the experts of a layer are, as weights: what tells upcycled models from those trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F

from mixlens.errors import BadInput
from mixlens.models.layout import describe, expert_weights, moe_layers

_CHUNK = 2**22
_MOST_NEURONS = 4096  # the assignment takes time with their cube


@torch.no_grad()
def expert_similarity(model: nn.Module, *, layers: Sequence[int] | None = None, match: bool = False) -> xr.Dataset:
    """Cosines between the experts of each layer, and between their router vectors.

    layers  layer numbers; None for all
    match   also pair up the neurons of every two experts by linear assignment

    A neuron is its row of w1, its row of w3 and its column of w2, put together. Two experts that were copied from one
    feed-forward layer and trained apart have alike neurons in the same places; experts trained from scratch have
    cosines near 0 in every matrix, whatever the order of their neurons.

    Returns  Dataset  cosine [layer, matrix (w1, w2, w3), expert, expert_j]; router_cosine [layer, expert, expert_j];
                      router_norm [layer, expert]; with match also in_place and matched [layer, expert, expert_j], the
                      mean cosine of neurons of equal number, and of matched ones; the diagonals are 1
    Raises   BadInput    for unknown layers, and for matching more than 4,096 neurons
             ModelError  where weights are offloaded or not fused
    """
    every = moe_layers(model)
    numbers = list(range(len(every))) if layers is None else [int(layer) for layer in layers]
    unknown = [number for number in numbers if not 0 <= number < len(every)]
    if unknown or not numbers:
        raise BadInput(
            f"Experts of layers {numbers} were to be compared. The model has layers 0 to {len(every) - 1}. "
            "Give numbers among them."
        )
    found: dict[str, list[np.ndarray]] = {}
    for layer in (every[number] for number in numbers):
        weights = expert_weights(layer)
        router = layer.gate.weight.float()
        one = {
            "cosine": np.stack([_cosines(matrix) for matrix in weights]),
            "router_cosine": _cosines(router),
            "router_norm": router.norm(dim=1).cpu().numpy(),
        }
        if match:
            one |= _matched(*weights)
        for name, values in one.items():
            found.setdefault(name, []).append(values)
    pair = ("layer", "expert", "expert_j")
    dims = {"cosine": ("layer", "matrix", "expert", "expert_j"), "router_norm": ("layer", "expert")}
    count = len(router)
    return xr.Dataset(
        {name: (dims.get(name, pair), np.stack(values)) for name, values in found.items()},
        {"layer": numbers, "matrix": ["w1", "w2", "w3"], "expert": range(count), "expert_j": range(count)},
        {"statistic": "expert_similarity", "unit": "cosine", "model": describe(model)["name"]},
    )


def assignment(gain: np.ndarray) -> np.ndarray:
    """The column for each row of a square matrix so that the sum of gains is largest (Kuhn 1955; shortest paths)."""
    n = len(gain)
    cost = np.vstack([np.zeros(n + 1), np.hstack([np.zeros((n, 1)), -np.asarray(gain, np.float64)])])
    of_row, of_column = np.zeros(n + 1), np.zeros(n + 1)  # prices; row and column 0 stand for none
    row_at = np.zeros(n + 1, np.intp)
    for row in range(1, n + 1):
        row_at[0], column = row, 0
        slack, before = np.full(n + 1, np.inf), np.zeros(n + 1, np.intp)
        used = np.zeros(n + 1, bool)
        while row_at[column]:
            used[column] = True
            here = row_at[column]
            reduced = cost[here] - of_row[here] - of_column
            nearer = ~used & (reduced < slack)
            slack[nearer], before[nearer] = reduced[nearer], column
            following = int(np.where(used, np.inf, slack)[1:].argmin()) + 1
            step = slack[following]
            of_row[row_at[used]] += step
            of_column[used] -= step
            slack[~used] -= step
            column = following
        while column:
            row_at[column], column = row_at[before[column]], before[column]
    columns = np.empty(n, np.intp)
    columns[row_at[1:] - 1] = np.arange(n)
    return columns


def _cosines(vectors: torch.Tensor) -> np.ndarray:
    """[E, E] of E tensors, each taken as one vector; converted piece by piece, never all at once."""
    flat = vectors.reshape(len(vectors), -1)
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat.shape[1], _CHUNK):
        piece = flat[:, start : start + _CHUNK].float()
        products += (piece @ piece.T).double().cpu()
    length = products.diagonal().sqrt()
    return (products / length[:, None] / length[None]).numpy()


def _matched(w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor) -> dict[str, np.ndarray]:
    count, neurons = w1.shape[:2]
    if neurons > _MOST_NEURONS:
        raise BadInput(
            f"Neurons of experts were to be matched. There are {neurons:,} in each, and the time grows with the cube; "
            f"the limit is {_MOST_NEURONS:,}. Leave match out: equal places are compared by cosine."
        )
    unit = F.normalize(torch.cat([w1, w3, w2.transpose(1, 2)], dim=-1).float(), dim=-1)
    in_place, matched = np.ones((2, count, count))
    for i, j in combinations(range(count), 2):
        cosine = (unit[i] @ unit[j].T).cpu().numpy()
        in_place[i, j] = in_place[j, i] = cosine.diagonal().mean()
        matched[i, j] = matched[j, i] = cosine[np.arange(neurons), assignment(cosine)].mean()
    return {"in_place": in_place, "matched": matched}
