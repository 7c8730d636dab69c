"""Similarity of the experts' weights in a layer, which distinguishes upcycled from newly trained models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations

import numpy as np
import torch
import xarray as xr
from accelerate.utils import align_module_device
from scipy.optimize import linear_sum_assignment
from torch import nn

from mixlens.models.layout import expert_weights, numbered_layers
from mixlens.models.provenance import describe

_CHUNK = 2**22


@torch.no_grad()
def measure_similarity(
    model: nn.Module, *, layers: int | Sequence[int] | None = None, match: bool = False
) -> xr.Dataset:
    """Compute cosines between the experts of each layer, and between their router vectors.

    A neuron is the concatenation of its row of w1, its row of w3 and its column of w2. Two experts copied from one
    feed-forward layer and then trained separately have similar neurons in the same places. Experts trained from scratch
    have cosines near 0 in every matrix, whatever the order of their neurons.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    layers : int or Sequence[int], optional
        Layer numbers; None for all.
    match : bool, optional
        Whether to match the neurons of every pair of experts by linear assignment (Crouse 2016). For the 14,336 neurons
        of 8x7B this takes 30 seconds on one core and 4 GB per pair, and a layer has 28 pairs, so restrict the layers.

    Returns
    -------
    Dataset
        cosine [layer, matrix (w1, w2, w3), expert, expert_j]; router_cosine [layer, expert, expert_j];
        router_norm [layer, expert]; with match also in_place and matched [layer, expert, expert_j], the mean cosine of
        neurons with the same number, and of matched neurons; diagonals are 1.

    Raises
    ------
    BadInput
        If a layer is unknown.
    ModelError
        If the layout of the weights is unknown.

    Examples
    --------
    >>> ml.experiments.measure_similarity(model)["router_cosine"].dims
    ('layer', 'expert', 'expert_j')
    """
    asked = numbered_layers(model, layers, "compare experts")
    found: dict[str, list[np.ndarray]] = {}
    for layer in asked:
        with _at_hand(layer.experts, layer.gate):
            weights = expert_weights(layer)
            router = layer.router_weight.float()
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
    count = len(found["router_norm"][0])
    return xr.Dataset(
        {name: (dims.get(name, pair), np.stack(values)) for name, values in found.items()},
        {
            "layer": [layer.index for layer in asked],
            "matrix": ["w1", "w2", "w3"],
            "expert": range(count),
            "expert_j": range(count),
        },
        {"statistic": "expert_similarity", "unit": "cosine", "model": describe(model)["name"]},
    )


def _cosines(vectors: torch.Tensor) -> np.ndarray:
    """Return the cosines [E, E] of E tensors as vectors, converting chunks to save memory."""
    flat = vectors.reshape(len(vectors), -1)
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat.shape[1], _CHUNK):
        piece = flat[:, start : start + _CHUNK].float()
        products += (piece @ piece.T).double().cpu()
    length = products.diagonal().sqrt()
    return (products / length[:, None] / length[None]).numpy()


def _matched(w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor) -> dict[str, np.ndarray]:
    count, neurons = w1.shape[:2]
    rows = (w1, w3, w2.transpose(1, 2))
    length = torch.stack([_sum_of_squares(expert, rows) for expert in range(count)]).sqrt().clamp(min=1e-12)
    in_place, matched = np.ones((2, count, count))
    for i, j in combinations(range(count), 2):
        cosine = torch.zeros(neurons, neurons, device=w1.device)
        for matrix in rows:
            cosine += matrix[i].float() @ matrix[j].float().T
        cosine = (cosine / length[i][:, None] / length[j][None]).cpu().numpy()
        in_place[i, j] = in_place[j, i] = cosine.diagonal().mean()
        row, column = linear_sum_assignment(cosine, maximize=True)
        matched[i, j] = matched[j, i] = cosine[row, column].mean()
    return {"in_place": in_place, "matched": matched}


def _sum_of_squares(expert: int, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of squares of each row [row] over all matrices [expert, row, column]."""
    return torch.stack([matrix[expert].float().pow(2).sum(-1) for matrix in matrices]).sum(0)


@contextmanager
def _at_hand(*modules: nn.Module) -> Iterator[None]:
    """Load weights that accelerate offloads, fused or in separate Linears, while the context is open."""
    with ExitStack() as stack:
        for module in modules:
            for part in module.modules():
                stack.enter_context(align_module_device(part))
        yield
