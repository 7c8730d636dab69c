"""Routing under edits: what a gate decided, changed edit by edit, and decided again where an edit asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mixlens.errors import BadInput
from mixlens.interventions.where import EVERYWHERE, Where
from mixlens.models.routing_rule import RouterRule

Layers = tuple[int, ...] | None  # None stands for all
Rows = torch.Tensor | None  # bool [T]; None stands for all


class Routing:
    """One gate's decision for T tokens, on its way through the edits of a layer.

    Edits change router logits, and say which experts may not and which must be chosen; of two that contradict each
    other the later holds. `result` then decides by the family's rule: the k strongest experts allowed, those forced
    first, and the weights that the rule gives them. Forbidding sets an expert's logit to -inf, so that a softmax over
    all experts gives its share to the others. A token that no edit touches keeps the model's own decision, bit for bit.
    """

    def __init__(self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, rule: RouterRule) -> None:
        self._given = logits, weights, ids
        self._rule = rule
        self.logits = logits.float()
        self.k = ids.shape[-1]
        self.banned = torch.zeros_like(logits, dtype=torch.bool)
        self.forced = torch.zeros_like(self.banned)
        self.fixed = torch.full_like(self.logits, torch.nan)  # weights asked for; NaN where the router decides

    def cells(self, experts: tuple[int, ...] | None, rows: Rows) -> torch.Tensor:
        """bool [T, E], true for these experts at these tokens."""
        cells = torch.zeros_like(self.banned)
        cells[:, slice(None) if experts is None else list(experts)] = True
        return cells if rows is None else cells & rows[:, None]

    def rescale(self, cells: torch.Tensor, factor: float, bias: float) -> None:
        self.logits = torch.where(cells, self.logits * factor + bias, self.logits)

    def ban(self, cells: torch.Tensor) -> None:
        self.banned, self.forced = self.banned | cells, self.forced & ~cells
        self.fixed = self.fixed.masked_fill(cells, torch.nan)

    def force(self, cells: torch.Tensor, weight: torch.Tensor | float | None = None) -> None:
        self.banned, self.forced = self.banned & ~cells, self.forced | cells
        if weight is not None:
            self.fixed = torch.where(cells, weight, self.fixed)

    def force_only(self, cells: torch.Tensor, weight: torch.Tensor | None, rows: torch.Tensor) -> None:
        """Of the tokens `rows`, forget what was forced before, and force `cells`."""
        self.forced = self.forced & ~rows[:, None]
        self.fixed = self.fixed.masked_fill(rows[:, None], torch.nan)
        self.force(cells, weight)

    def reroute(self, source: int, target: int, rows: Rows) -> None:
        moved = (self.decide()[1] == source).any(-1)
        moved = moved if rows is None else moved & rows
        inherits = self.cells((target,), moved)
        strongest = torch.maximum(self.logits[:, source], self.logits[:, target])
        self.logits = torch.where(inherits, strongest[:, None], self.logits)
        was_forced, weight = self.forced[:, source], self.fixed[:, source].clone()
        self.banned = self.banned & ~inherits
        self.force(inherits & was_forced[:, None], weight[:, None])
        self.ban(self.cells((source,), moved))

    def choose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [T, k], ids [T, k]), strongest first."""
        logits = self.logits.masked_fill(self.banned, -torch.inf)
        rank = self._rule.ranks(logits, self.banned).masked_fill(self.forced, torch.inf)
        ids = rank.topk(self.k, dim=-1).indices
        if in_turn := self._rule.rule.score == "sparsemixer":
            ids = ids.gather(1, logits.gather(1, ids).argsort(dim=-1, descending=True))
        weights = self._rule.weights(logits, ids)
        asked = self.fixed.gather(1, ids)
        free = weights.masked_fill(~asked.isnan(), 0)
        left: Any = 1.0
        if self._rule.total is not None:  # else weights do not depend on one another
            left = self._rule.total - asked.nansum(-1, keepdim=True)
            left = left / free.sum(-1, keepdim=True).clamp(min=1e-30)
        weights = torch.where(
            asked.isnan(), torch.where(asked.isnan().all(-1, keepdim=True), weights, free * left), asked
        )
        if in_turn:  # the order of choice, in which later ones may weigh more
            return weights, ids
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        return weights, ids.gather(1, order)

    def check(self) -> None:
        """Raises BadInput when edits together leave a token too few experts, or force too many upon it."""
        few, many = (~self.banned).sum(-1) < self.k, self.forced.sum(-1) > self.k
        if bool(few.any()) or bool(many.any()):
            what = "forbid all but fewer than" if bool(few.any()) else "force more than"
            raise BadInput(
                f"Cannot apply these edits together: for {int((few | many).sum())} tokens of this forward they {what} "
                f"the {self.k} experts a token chooses. Take one of them back, or change top_k.",
                argument="forbid" if bool(few.any()) else "force",
                value=int((few | many).sum()),
            )

    def decide(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [T, k], ids [T, k]): as chosen, but of tokens that no edit touches as given: logits may tie."""
        given_logits, given_weights, given_ids = self._given
        weights, ids = self.choose()
        if self.k == given_ids.shape[-1]:
            chosen = torch.zeros_like(self.banned).scatter(1, given_ids, True)
            met = self.banned & chosen if self._rule.alone else self.banned
            new = (self.logits != given_logits.float()) | met | (self.forced & ~chosen)
            new = (new | ~self.fixed.isnan()).any(-1, keepdim=True)
            weights = torch.where(new, weights.to(given_weights.dtype), given_weights)
            ids = torch.where(new, ids, given_ids)
        return weights.to(given_weights.dtype), ids

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits [T, E], weights [T, k], ids [T, k]) as the model goes on with them; a forbidden logit is -inf."""
        logits = self.logits.masked_fill(self.banned, -torch.inf).to(self._given[0].dtype)
        return logits, *self.decide()


@dataclass(frozen=True)
class Forbid:
    layers: Layers
    experts: tuple[int, ...]
    where: Where = EVERYWHERE

    def apply(self, routing: Routing, layer: int, rows: Rows, index: Any) -> None:
        routing.ban(routing.cells(self.experts, rows))


@dataclass(frozen=True)
class Force:
    layers: Layers
    experts: tuple[int, ...]
    weight: float | None = None
    where: Where = EVERYWHERE

    def apply(self, routing: Routing, layer: int, rows: Rows, index: Any) -> None:
        routing.force(routing.cells(self.experts, rows), self.weight)


@dataclass(frozen=True)
class Rescale:
    """Router logits times `factor` plus `bias`."""

    layers: Layers
    experts: tuple[int, ...] | None
    factor: float = 1.0
    bias: float = 0.0
    where: Where = EVERYWHERE

    def apply(self, routing: Routing, layer: int, rows: Rows, index: Any) -> None:
        routing.rescale(routing.cells(self.experts, rows), self.factor, self.bias)


@dataclass(frozen=True)
class TopK:
    layers: Layers
    k: int
    where: Where = field(default=EVERYWHERE, init=False)

    def apply(self, routing: Routing, layer: int, rows: Rows, index: Any) -> None:
        routing.k = self.k


@dataclass(frozen=True)
class Reroute:
    layers: Layers
    source: int
    target: int
    where: Where = EVERYWHERE

    @property
    def experts(self) -> tuple[int, ...]:
        return self.source, self.target

    def apply(self, routing: Routing, layer: int, rows: Rows, index: Any) -> None:
        routing.reroute(self.source, self.target, rows)
