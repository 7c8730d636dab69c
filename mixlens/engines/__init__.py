"""Routing from elsewhere: engines, servers and files, checked before it is believed."""

from mixlens.core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
