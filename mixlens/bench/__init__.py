"""How fast a model answers: event records, metrics as pure functions of them, load, and local measurements."""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
