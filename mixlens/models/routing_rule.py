"""How a router decides, as data of a few parts: from router logits to the experts chosen and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_SLACK = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Groups:
    """Experts stand in groups of equal size, and only those of the best groups can be chosen.

    Parameters
    ----------
    by : str
        What a group is ranked by: "best", its best expert, or "pair", the sum of its two best.
    only : tuple[str, str], optional
        An attribute of the router and the value with which groups are used.
    """

    by: str
    only: tuple[str, str] | None = None


@dataclass(frozen=True)
class Rule:
    """How one family's routers decide.

    Where a part is text, it names the attribute of the router that holds its value.

    Parameters
    ----------
    score : str
        What logits become: "softmax", "sigmoid", or "sparsemixer", which scores one choice after the other (Liu et al.
        2023, arXiv:2310.00811).
    ranked : str
        What experts are ranked by: "score", or "logit", where top-k comes before scoring, so that a softmax is over the
        chosen experts alone.
    bias : str, optional
        A tensor of the router, or of the block around it, that is added to rank experts and not to weigh them.
    groups : Groups, optional
        For routing limited to groups.
    renormalised : bool or str
        Whether the weights of the chosen experts are divided by their sum.
    scale : float or str
        What the weights are multiplied by in the end.

    Examples
    --------
    >>> Rule("sigmoid", bias="e_score_correction_bias", renormalised=True).ranked
    'score'
    """

    score: str = "softmax"
    ranked: str = "score"
    bias: str | None = None
    groups: Groups | None = None
    renormalised: bool | str = False
    scale: float | str = 1.0

    def __str__(self) -> str:
        scored = self.score if self.score in ("softmax", "sigmoid", "sparsemixer") else "softmax or sigmoid"
        normed = "renormalised by config" if isinstance(self.renormalised, str) else "renormalised"
        parts = [
            scored if self.ranked == "score" else "",
            "bias to rank by" if self.bias else "",
            "groups" if self.groups else "",
            "top-k",
            scored if self.ranked == "logit" else "",
            normed if self.renormalised else "",
            "scaled" if self.scale != 1.0 else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class RouterRule:
    """A rule with the numbers of one router.

    total  what the weights of a token's experts sum to; None where that differs between tokens
    """

    rule: Rule
    router: Any
    block: Any

    def _value(self, part: Any) -> Any:
        return getattr(self.router, part) if isinstance(part, str) else part

    @property
    def score(self) -> str:
        return getattr(self.router, self.rule.score, self.rule.score)

    @property
    def total(self) -> float | None:
        return float(self._value(self.rule.scale)) if self._sums else None

    @property
    def _sums(self) -> bool:
        return bool(self._value(self.rule.renormalised)) or (self.score, self.rule.ranked) == ("softmax", "logit")

    @property
    def alone(self) -> bool:
        """Whether experts that are not chosen change nothing for those that are, by a group's rank or a softmax."""
        rule = self.rule
        if rule.groups is not None or self.score == "sparsemixer":
            return False
        return self.score == "sigmoid" or (self._sums and (rule.bias is None or rule.ranked == "logit"))

    def ranks(self, logits: torch.Tensor, banned: torch.Tensor | None = None) -> torch.Tensor:
        """What experts are ranked by [T, E] float32, from router logits [T, E]; -inf where one cannot be chosen."""
        logits = logits.float()
        bias = None if self.rule.bias is None else _found(self.rule.bias, self.router, self.block)
        alike = bias is None and self.rule.groups is None  # scores rise with logits, and may underflow
        ranks = logits if alike or self.rule.ranked == "logit" else self._scores(logits)
        if bias is not None:
            ranks = ranks + bias.to(ranks).reshape(1, -1)
        if banned is not None:
            ranks = ranks.masked_fill(banned, -torch.inf)
        return self._within_groups(ranks)

    def weights(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Weights [T, k] float32 of the experts `ids`, whoever chose them."""
        logits = logits.float()
        if self.score == "sparsemixer":
            weights = self._sparsemixer(logits, ids)
        elif self.score == "softmax" and self._sums:  # no score underflows as it would over all
            weights = torch.softmax(logits.gather(1, ids), dim=-1)
        else:
            weights = self._scores(logits).gather(1, ids)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20) if self._sums else weights
        return weights * float(self._value(self.rule.scale))

    def agrees(self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether the rule explains what the router decided; of experts that tie, any may have been chosen.

        Tokens whose weights are not finite say nothing of the rule.
        """
        finite = weights.isfinite().all(-1)
        logits, weights, ids = logits[finite], weights[finite], ids[finite]
        slack = _SLACK.get(weights.dtype, 1e-4)
        ranks = self.ranks(logits)
        best = ranks.topk(ids.shape[-1], dim=-1).values
        chosen = ranks.gather(1, ids).sort(dim=-1, descending=True).values
        return torch.allclose(best, chosen, rtol=slack, atol=slack * 1e-2) and torch.allclose(
            self.weights(logits, ids), weights.float(), rtol=slack, atol=slack * 1e-1
        )

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)

    def _within_groups(self, ranks: torch.Tensor) -> torch.Tensor:
        groups = self.rule.groups
        if groups is None or (groups.only is not None and getattr(self.router, groups.only[0]) != groups.only[1]):
            return ranks
        count, kept = self.router.num_group, self.router.topk_group
        if count is None or count == kept:
            return ranks
        members = ranks.view(len(ranks), count, -1)
        best = members.topk(1 if groups.by == "best" else 2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        allowed = torch.zeros(len(ranks), count, dtype=torch.bool, device=ranks.device).scatter(1, best, True)
        return members.masked_fill(~allowed[..., None], -torch.inf).view_as(ranks)

    def _sparsemixer(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """One softmax a slot, over the experts not chosen before it that come near enough to the one it chose."""
        free, found = logits, []
        for slot in range(ids.shape[-1]):
            chosen = logits.gather(1, ids[:, slot, None])
            near = (chosen - logits) / torch.maximum(logits.abs(), chosen) <= 2 * self.router.router_jitter_noise
            near = near.scatter(1, ids[:, slot, None], True)
            found.append(free.masked_fill(~near, -torch.inf).softmax(-1).gather(1, ids[:, slot, None]))
            free = free.scatter(1, ids[:, slot, None], -torch.inf)
        return torch.cat(found, 1)


def _found(path: str, *places: Any) -> torch.Tensor | None:
    for place in places:
        for name in path.split("."):
            place = getattr(place, name, None)
        if isinstance(place, torch.Tensor):
            return place
    return None
