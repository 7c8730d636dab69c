"""Experiments that intervene in a model: importance, contributions, top-k, quantization impact, trade-offs."""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
