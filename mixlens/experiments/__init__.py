"""Measurements that intervene: importance, contributions, the number of experts, quantization impact, trade-offs."""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
