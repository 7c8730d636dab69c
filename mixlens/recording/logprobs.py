"""Next-token log-probabilities, without ever holding [token, vocabulary] for a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mixlens.trace.signals import TOP

_ROWS = 1024


@torch.no_grad()
def score(
    logits_of: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, target: torch.Tensor, *, top: bool
) -> dict[str, np.ndarray]:
    """What the model said of the token after each state.

    logits_of  gives [n, vocabulary] for states [n, ...]: the head, or the identity where logits are at hand
    target     int64 [n], the token that came next, -1 where none is known

    Gives logprob float32 [n] of the target (NaN for -1); with `top` also top_id int32 [n, 64], top_logprob float32
    [n, 64] in falling order, and tail_logprob float32 [n], the logarithm of what the rest of the vocabulary has.
    """
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(states), _ROWS):
        logits = logits_of(states[start : start + _ROWS]).float()
        wanted = target[start : start + _ROWS].to(logits.device)
        logp = torch.log_softmax(logits, dim=-1)
        chosen = logp.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        part = {"logprob": chosen.masked_fill(wanted < 0, torch.nan).cpu().numpy()}
        if top:
            best = logp.topk(min(TOP, logp.shape[-1]), dim=-1)
            rest = logp.scatter(1, best.indices, -torch.inf).logsumexp(dim=-1)
            part |= {
                "top_id": best.indices.to(torch.int32).cpu().numpy(),
                "top_logprob": best.values.cpu().numpy(),
                "tail_logprob": rest.cpu().numpy(),
            }
        parts.append(part)
    if not parts:
        return {}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
