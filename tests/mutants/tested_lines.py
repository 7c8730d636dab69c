"""Which tests run which lines, and how long each takes: a plugin of pytest around coverage.py.

What a shared fixture runs belongs to every test that asks for it, not to the first one alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import coverage
import pytest


class TestedLines:
    def __init__(self, root: Path, files: list[str], data: Path) -> None:
        self.root, self.files, self.data = root, files, data
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[str(root / f) for f in files])
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.users: dict[str, list[str]] = defaultdict(list)  # of a shared fixture
        self.context = ""
        self.coverage.start()

    def _within(self, context: str):
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        try:
            return (yield)
        finally:
            self.context = before
            self.coverage.switch_context(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            for fixture in definitions:
                if fixture.scope != "function":
                    self.users[_name(fixture)].append(item.nodeid)
        return (yield from self._within(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        return (yield from self._within(_name(fixturedef)))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        self.coverage.stop()
        measured = self.coverage.get_data()
        lines: dict[str, dict[int, list[str]]] = {}
        for file in self.files:
            by_line = measured.contexts_by_lineno(str(self.root / file))
            lines[file] = {
                n: sorted({test for c in contexts if c for test in self.users.get(c, [c])})
                for n, contexts in by_line.items()
            }
        found = {"seconds": self.seconds, "failed": sorted(self.failed), "lines": lines}
        self.data.write_text(json.dumps(found), "utf-8")


def _name(fixture) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"
