"""Decisions from routing: experts read per step, caches, placement, pruning, bit allocation and steering.

Every function returns a verdict in ``attrs["verdict"]``, judged on documents on which nothing was fitted.
"""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
