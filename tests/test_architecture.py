"""The import rule: a module imports only from floors below its own, and importing mixlens is fast and quiet."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixlens

PACKAGE = Path(mixlens.__file__).parent
# From the ground up. A module's floor is that of the longest name here that it starts with.
FLOORS = [
    {"mixlens.errors"},
    {"mixlens.runs", "mixlens.models"},
    {"mixlens.traces"},
    {"mixlens.stats"},
    {"mixlens.bench", "mixlens.evals"},
    {"mixlens.kinds", "mixlens.importance", "mixlens.contributions", "mixlens.measuring", "mixlens.sweep"},
    {"mixlens.comparing", "mixlens.impact"},
    {"mixlens.show"},
    {"mixlens.schemes"},
    {"mixlens.explore", "mixlens.arguments", "mixlens.comparing_commands", "mixlens.intervening_commands"},
    {"mixlens.cli", "mixlens.__main__"},
]


def floor(module: str) -> int:
    names = [(name, level) for level, names in enumerate(FLOORS) for name in names]
    found = [(len(name), level) for name, level in names if module == name or module.startswith(name + ".")]
    assert found, f"{module} stands on no floor: add it to FLOORS"
    return max(found)[1]


def imports(path: Path) -> set[str]:
    """Modules of mixlens that a file imports, anywhere in it, except for type checkers only."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mixlens"):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in submodules if is_module(name)} or {node.module}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("mixlens")}
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_below(path):
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    above = {name for name in imports(path) if floor(name) > floor(module)}
    assert not above, f"{module} imports from floors above its own: {sorted(above)}"


def test_stats_and_show_never_see_a_model():
    for folder in ("stats", "show"):
        for path in (PACKAGE / folder).rglob("*.py"):
            roots = {
                (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.Import | ast.ImportFrom)
            }
            assert not roots & {"torch", "transformers", "pickle"}, f"{path} imports {roots}"


def test_files_stay_below_400_lines():
    long = {str(p.relative_to(PACKAGE)): n for p in MODULES if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert not long


def test_importing_mixlens_loads_nothing_heavy_and_prints_nothing():
    script = "import sys, mixlens; print(sorted({'torch', 'pandas', 'xarray', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_every_public_name_is_there_and_documented():
    for name in mixlens.__all__:
        assert getattr(mixlens, name).__doc__, f"mixlens.{name} has no docstring"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError):
        mixlens.recrod  # noqa: B018
