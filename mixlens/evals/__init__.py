"""Benchmark evaluation on lm-eval: runner, protocols, checks, logs of every sample, and published scores."""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
