"""Forwards whose tensors hold no values to keep: inside transformations of torch.func, under export, on meta."""

from __future__ import annotations

import torch
from torch._C import _functorch  # type: ignore[attr-defined]  which torch's stubs leave out
from torch._subclasses import FakeTensor

from mixlens.errors import RecordingError


def refuse_without_values(who: str, read: torch.Tensor) -> None:
    """Raises RecordingError where a forward that reads `read` computes nothing that can be looked at."""
    if _functorch.peek_interpreter_stack() is not None:
        what, place = "a transformation of torch.func, such as vmap, grad or jvp", "torch.func"
    elif read.is_meta or isinstance(read, FakeTensor):
        what, place = "a forward on the meta device or under torch.export", "meta"
    else:
        return
    raise RecordingError(
        f"{who} cannot follow {what}: its tensors hold no values to look at. Call the model itself inside the block, "
        "and transform it outside.",
        argument="model",
        value=place,
    )


def refuse_batched(who: str, logits: torch.Tensor) -> None:
    """Raises RecordingError for router logits of vmap; other transformations of torch.func pass through edits."""
    if _functorch.is_batchedtensor(logits):
        refuse_without_values(who, logits)


def recomputing() -> bool:
    """Whether a backward runs, in which checkpointed layers run a second time."""
    return torch._C._current_graph_task_id() != -1
