"""Benchmark scores on lm-eval: the runner, its protocols and checks, the log of every sample, published references."""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
