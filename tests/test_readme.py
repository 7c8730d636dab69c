"""The README's code runs as it stands, and its commands are ones that the command line knows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import pytest

from mixlens import stats
from mixlens.cli import main as cli
from mixlens.cli.runs import Statistic

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_its_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_its_commands_are_understood():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = re.findall(r"^mixlens (.+)$", shell, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        cli.app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_its_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_its_statistics_are_those_there_are():
    table = README.split("## Statistics")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+)`", table.split("Every one takes")[0]))
    assert named == {*get_args(Statistic), "agreement"}
    assert all(hasattr(stats, name) for name in named)
