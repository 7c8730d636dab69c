"""mixlens: see what every expert of a Mixtral model does.

Names are loaded when they are first used, so that importing mixlens is fast and imports neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixlens import show, stats
    from mixlens.errors import BadInput, MissingSignal, MixlensError, ModelError, RunError
    from mixlens.models.demo import demo_documents
    from mixlens.models.load import load
    from mixlens.show import view
    from mixlens.show.report import report
    from mixlens.traces.record import RecordSettings, record
    from mixlens.traces.recorder import Recorder
    from mixlens.traces.signals import Site
    from mixlens.traces.trace import Trace, concat

    open = Trace.open

__version__ = "0.1.0"

_HOME = {
    "BadInput": "mixlens.errors",
    "MissingSignal": "mixlens.errors",
    "MixlensError": "mixlens.errors",
    "ModelError": "mixlens.errors",
    "RunError": "mixlens.errors",
    "RecordSettings": "mixlens.traces.record",
    "Recorder": "mixlens.traces.recorder",
    "Site": "mixlens.traces.signals",
    "Trace": "mixlens.traces.trace",
    "concat": "mixlens.traces.trace",
    "demo_documents": "mixlens.models.demo",
    "load": "mixlens.models.load",
    "open": "mixlens.kinds",
    "record": "mixlens.traces.record",
    "report": "mixlens.show.report",
    "show": None,
    "stats": None,
    "view": "mixlens.show",
}

__all__ = [  # noqa: PLE0604
    "BadInput",
    "MissingSignal",
    "MixlensError",
    "ModelError",
    "RecordSettings",
    "Recorder",
    "RunError",
    "Site",
    "Trace",
    "concat",
    "demo_documents",
    "load",
    "open",
    "record",
    "report",
    "show",
    "stats",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mixlens' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = _HOME[name]
    value = import_module(f"mixlens.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
