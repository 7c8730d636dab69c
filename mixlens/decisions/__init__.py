"""From routing to a decision: what a step reads, what fits in a cache, where an expert belongs, and which can go.

Every function ends with a verdict in ``attrs["verdict"]``, judged on documents that nothing was fitted on.
"""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
