"""Lazy imports of the public names of packages.

The stub next to a package's __init__.py lists the names, for type checkers and at run time. lazy_loader does the same,
but only for names from within the package.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package from the imports of its stub.

    Parameters
    ----------
    package : str
        ``__name__`` of the package.
    file : str
        ``__file__`` of the package; the stub has the suffix ``.pyi``.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text("utf-8"))
    homes = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    names = sorted(homes)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")
        module, original = homes[name]
        # Both imports are listed in the stub, where type checkers see them.
        if module == package or not hasattr(home := importlib.import_module(module), original):  # noqa: TID251
            return importlib.import_module(f"{module}.{original}")  # noqa: TID251
        return getattr(home, original)

    return get, lambda: names, names
