"""Sources of routing outside this process's models: an Endpoint, or an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from mixlens.endpoints.endpoint import Endpoint
from mixlens.engines.server import Server
from mixlens.engines.vllm_engine import VLLM
from mixlens.errors import MissingSignal
from mixlens.trace.shards import MemoryPart
from mixlens.trace.signals import DEFAULT, Signals, Site, parse_signals


class SourceReader(Protocol):
    """Reads sequences as `recording.reader.Reader` does."""

    signals: Signals

    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: object) -> None: ...
    @property
    def rule(self) -> str: ...
    def read(
        self, sequences: list[np.ndarray], first_sequence: int = 0, phases: Sequence[np.ndarray | None] | None = None
    ) -> MemoryPart: ...
    def check(self) -> dict[str, Any]:
        """Return the checks since the last call."""
        ...


class Source(Protocol):
    """A model that runs elsewhere.

    skeleton  the same transformers model without weights
    name      the source name in traces, such as "vllm 0.32.0"
    signals   available besides expert ids
    """

    @property
    def skeleton(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def signals(self) -> frozenset[str]: ...
    def describe(self) -> dict[str, Any]: ...
    def reader(self, signals: Signals) -> SourceReader: ...


def source_of(target: Any, tokenizer: Any = None) -> Source | None:
    """Return the source for a target; None for other objects, such as a loaded model."""
    if isinstance(target, Endpoint):
        return Server(target, tokenizer)
    return target if isinstance(target, VLLM) else None


def signals_of(source: Source, asked: Iterable[str | Site], layers: Sequence[int]) -> Signals:
    """Return the signals to record: requested ones must be available, defaults are used if they are.

    Raises
    ------
    MissingSignal
        For a signal that is asked for, and that the source cannot tell.
    """
    wanted = [name for name in asked if asked is not DEFAULT or name in source.signals]
    names = [name.name if isinstance(name, Site) else name for name in wanted]
    if lacking := [name for name in names if name not in source.signals]:
        raise MissingSignal(
            f"Cannot record {lacking[0]}: {source.name} tells {', '.join(sorted({'expert_id', *source.signals}))}. "
            "Leave it out, or record with a local model, ml.load(...).",
            argument=lacking[0],
            value=source.name,
        )
    return parse_signals(wanted, list(layers))
