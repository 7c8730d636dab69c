"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal by a Newton-Schulz iteration."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """Bring the singular values of every matrix of `matrices` [N, rows, columns] near to 1."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Each parameter is a pair of a tensor and its number of rows a matrix, so that stacked matrices are told apart."""

    def __init__(self, parameters: Iterable[tuple[Tensor, int]], *, lr: float, momentum: float, weight_decay: float):
        pairs = list(parameters)
        self._rows = [rows for _, rows in pairs]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([tensor for tensor, _ in pairs], defaults)

    @torch.no_grad()
    def step(self) -> None:
        """One update. Matrices of one shape are orthogonalized together, whichever layer or expert they are of."""
        (group,) = self.param_groups
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, rows in zip(group["params"], self._rows, strict=True):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(state["momentum"], group["momentum"])
            by_shape[rows, parameter.shape[-1]].append((parameter, update.view(-1, rows, parameter.shape[-1])))
        for (rows, columns), entries in by_shape.items():
            stacked = orthogonalize(torch.cat([update for _, update in entries]))
            parts = stacked.split([len(update) for _, update in entries])
            scale = max(1.0, rows / columns) ** 0.5
            for (parameter, _), part in zip(entries, parts, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(part.reshape(parameter.shape), alpha=-group["lr"] * scale)
