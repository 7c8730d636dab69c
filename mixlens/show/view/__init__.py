"""Live views: each takes what a statistic or a recording gave, and returns a View, one output of a notebook."""

from mixlens.show.view.base import View
from mixlens.show.view.text import tokens

__all__ = ["View", "tokens"]
