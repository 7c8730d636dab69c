"""The bundle of live views is made of the modules in assets, whose own tests run in Playwright's Node."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from mixlens.live.bundle import module_source

REPOSITORY = Path(__file__).parents[2]
ASSETS = REPOSITORY / "mixlens" / "live" / "assets"


def test_the_bundle_is_made_of_the_modules_as_they_are():
    sources = b"".join(path.read_bytes() for path in (*sorted(ASSETS.glob("*.js")), ASSETS / "mixlens.css"))
    made_of = module_source().splitlines()[0].strip("/* ")
    assert made_of == hashlib.sha256(sources).hexdigest(), "Run make views."


def test_the_modules_pass_their_own_tests():
    playwright = pytest.importorskip("playwright", reason="Playwright brings Node")
    node = Path(playwright.__file__).parent / "driver" / "node"
    done = subprocess.run(
        [node, "--test", *(REPOSITORY / "tests" / "show").glob("*.test.js")],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
