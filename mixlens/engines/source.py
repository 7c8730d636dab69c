"""Sources of routing outside transformers: an Endpoint, or an engine in this process."""

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
    """Reads sequences with the interface of `recording.reader.Reader`."""

    signals: Signals

    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: object) -> None: ...
    @property
    def rule(self) -> str: ...
    def read(
        self, sequences: list[np.ndarray], first_sequence: int = 0, phases: Sequence[np.ndarray | None] | None = None
    ) -> MemoryPart: ...
    def check(self) -> dict[str, Any]:
        """Return what was checked since the previous call."""
        ...


class Source(Protocol):
    """A model that runs outside transformers.

    skeleton  the same model in transformers, without weights
    name      source named in traces, such as "vllm 0.32.0"
    signals   available signals other than expert ids
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
    """Return the source of a target; None if it has none, such as a loaded model."""
    if isinstance(target, Endpoint):
        return Server(target, tokenizer)
    return target if isinstance(target, VLLM) else None


def signals_of(source: Source, asked: Iterable[str | Site], layers: Sequence[int]) -> Signals:
    """Return the signals to record: all that are requested by name, or the available ones of the default.

    Raises
    ------
    MissingSignal
        If a requested signal is not available from the source.
    """
    wanted = [name for name in asked if asked is not DEFAULT or name in source.signals]
    names = [name.name if isinstance(name, Site) else name for name in wanted]
    if lacking := [name for name in names if name not in source.signals]:
        raise MissingSignal(
            f"Cannot record {lacking[0]}: {source.name} only provides "
            f"{', '.join(sorted({'expert_id', *source.signals}))}. Leave it out, or record "
            "with a local model, ml.load(...).",
            argument=lacking[0],
            value=source.name,
        )
    return parse_signals(wanted, list(layers))
