"""Decisions based on routing: reads per step, caching, placement, pruning and bit allocation.

Every function returns a verdict in ``attrs["verdict"]``, judged on documents that were not used for fitting.
"""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
