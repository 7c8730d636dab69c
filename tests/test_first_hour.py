"""The first hour of a newcomer, in its short form: an installed wheel, the README, and every fourth task."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "first_hour.py"


@pytest.mark.slow
def test_the_first_hour_goes_well():
    found = subprocess.run([sys.executable, str(SCRIPT), "--short"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
