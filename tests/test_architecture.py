"""The import rule: a module imports only from floors below its own, and importing mixlens is fast and quiet."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mixlens

PACKAGE = Path(mixlens.__file__).parent
REPOSITORY = PACKAGE.parent
PACKAGES = [mixlens, mixlens.bench, mixlens.decisions, mixlens.evals, mixlens.experiments, mixlens.pricing]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The package and its rules, where a test may break them."""
    copy = tmp_path_factory.mktemp("copied")
    shutil.copytree(PACKAGE, copy / "mixlens", ignore=shutil.ignore_patterns("__pycache__", "_demo", "assets"))
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    return copy


def imports_allowed(copy):
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=copy, capture_output=True, text=True)
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return done.returncode == 0


def test_a_module_imports_only_from_below(copied):
    assert imports_allowed(copied)


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("stats/counts.py", "from mixlens.reports.report import report"),
        ("trace/trace.py", "def later():\n    import mixlens.show"),
        (
            "models/load.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mixlens.bench.bench import Bench",
        ),
        ("bench/bench.py", "from mixlens.evals.log import Log"),
        ("stats/softmax.py", "from mixlens.stats import routing"),
        ("unplaced.py", ""),
    ],
)
def test_a_planted_import_that_points_up_is_found(copied, module, planted):
    path = copied / "mixlens" / module
    before = path.read_text("utf-8") if path.exists() else None
    path.write_text(f"{before or ''}\n{planted}\n", "utf-8")
    try:
        assert not imports_allowed(copied)
    finally:
        path.unlink() if before is None else path.write_text(before, "utf-8")


@pytest.mark.parametrize(
    "planted",
    [
        "import importlib\nimportlib.import_module('mixlens.show')",
        "from importlib import import_module",
        "import importlib as i\ni.import_module('mixlens.show')",
        "from . import counts",
        "from ..show import text",
    ],
)
def test_an_import_that_the_linter_cannot_see_is_refused(copied, planted):
    path = copied / "mixlens" / "stats" / "planted.py"
    path.write_text(planted + "\n", "utf-8")
    try:
        command = [BIN / "ruff", "check", "--no-cache", "--select", "TID251,TID252", path]
        assert subprocess.run(command, cwd=copied, capture_output=True).returncode == 1
    finally:
        path.unlink()


def test_nothing_is_imported_by_the_builtin():
    for path in PACKAGE.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        assert "__import__" not in names or path.name.startswith("sandbox_"), path


@pytest.mark.parametrize("folder", ["stats", "plot", "live", "trace"])
def test_statistics_and_figures_never_see_a_model(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        roots = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not roots & {"torch", "transformers", "pickle"}, f"{path} imports {roots}"


@pytest.mark.parametrize("name", ["score_table", *mixlens.show._MOVED])
def test_a_figure_keeps_its_name_of_before(name):
    with pytest.warns(DeprecationWarning, match=name):
        assert callable(getattr(mixlens.show, name))


def test_importing_mixlens_loads_nothing_heavy_and_prints_nothing():
    script = "import sys, mixlens; print(sorted({'torch', 'pandas', 'xarray', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_documented(package):
    assert package.__all__ == dir(package)
    for name in package.__all__:
        assert getattr(package, name).__doc__, f"{package.__name__}.{name} has no docstring"


@pytest.mark.parametrize("name", sorted(mixlens._MOVED))
def test_a_name_of_before_works_and_says_the_new_one(name):
    with pytest.warns(DeprecationWarning, match=name) as told:
        found = getattr(mixlens, name)
    [now] = re.findall(r"use (ml\..+)\.$", str(told[0].message))
    if "(" not in now:
        assert eval(now, {"ml": mixlens}) is found
    assert told[0].filename == __file__


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError):
        mixlens.recrod  # noqa: B018


def test_opening_comparing_and_benchmarks_of_servers_take_no_torch():
    code = "import sys, mixlens.comparison, mixlens.reports.trace, mixlens.bench.run; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
