"""Attention masks: which of them can be followed, and what each token attends to under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mixlens.errors import RecordingError

_MASKED = -1e3  # what is added to a score to mask it; exp(-1000) is zero in every type


class Seen(NamedTuple):
    """What each column of a forward attends to; all [rows, columns], or what broadcasts to it.

    own    whether to itself, which padding does not
    first  the first column of the cache, and
    last   the last, among
    count  so many; -1 where heads differ
    """

    own: Any
    first: Any
    last: Any
    count: Any


def seen_by(mask: torch.Tensor, past: int, columns: int) -> Seen:
    """What a mask [rows, heads, columns, keys] says, on its device."""
    allowed = mask if mask.dtype == torch.bool else mask > _MASKED
    one, every = allowed.any(1), allowed.all(1)
    at = torch.arange(columns, device=mask.device)
    bits = one.to(torch.uint8)
    last = bits.shape[-1] - 1 - bits.flip(-1).argmax(-1)
    count = torch.where((one == every).all(-1), one.sum(-1), -1)
    return Seen(one[:, at, past + at], bits.argmax(-1), last, count)


def without_window(seen: Seen, columns: int) -> Seen:
    """The same as if a layer that looks back a number of columns only looked back to where the document begins.

    For masks that were made from position ids, without padding.
    """
    at = torch.arange(columns, device=seen.first.device)
    begins = torch.where(seen.first == at, at, 0).cummax(1).values
    cut = (seen.count == seen.count.max()) & (seen.count == at - seen.first + 1)
    return seen._replace(
        first=torch.where(cut, begins, seen.first), count=torch.where(cut, at - begins + 1, seen.count)
    )


def seen_by_columns(mask: torch.Tensor, past: int, columns: int) -> Seen:
    """What a mask [rows, keys] says, on its device."""
    mask = mask.bool()
    at = past + torch.arange(columns, device=mask.device)
    return Seen(mask[:, at], mask.to(torch.uint8).argmax(1)[:, None], at, mask.cumsum(1)[:, at])


def check_mask(
    mask: Any, shape: tuple[int, int], past: int, attention: str, refusal: Callable[..., RecordingError]
) -> None:
    """Raises RecordingError for a mask of which nobody can say what a forward of this shape attends to."""
    if mask is None:
        return
    rows, columns = shape
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        what = f"{mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        wrong = f"an attention mask of {what}. Pass a tensor [rows, columns] of 0 and 1"
    elif (
        len(mask) not in ((rows,) if mask.ndim == 2 else (1, rows))
        or mask.shape[-1] < past + columns
        or (mask.ndim == 4 and mask.shape[2] != columns)
    ):
        wrong = f"an attention mask of shape {list(mask.shape)}. Pass a mask of all its tokens"
    elif mask.ndim == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        wrong = f"an attention mask of four dimensions and type {mask.dtype}. Pass one of bool or of floats"
    elif mask.ndim == 4 and mask.dtype == torch.bool and attention == "eager":
        wrong = (
            "a boolean attention mask under eager attention, which adds it to the scores and masks nothing. Pass 0 "
            "where a token may look and the smallest number where it may not"
        )
    else:
        return
    raise refusal(
        f"a forward of {rows} rows of {columns} tokens, after {past} in the cache, with {wrong}", "attention_mask"
    )
