"""Benchmarks of endpoints and loaded models: load generation, records of requests, and metrics."""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
