"""constraints.txt pins every package that make installs, at the version that is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
EXTRAS = {"test", "browser", "dev"}


def installed(name: str, extras: set[str], seen: dict[str, str]) -> dict[str, str]:
    """{package: version} of all that a package needs and that is here, with these extras."""
    for text in distribution(name).requires or []:
        need = Requirement(text)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras})
        key = canonicalize_name(need.name)
        if not wanted:
            continue
        try:
            version = Version(distribution(need.name).version).public
        except PackageNotFoundError:  # another platform's
            continue
        known = key in seen
        seen[key] = version
        if not known or need.extras:
            installed(need.name, set(need.extras), seen)
    return seen


def test_every_package_is_pinned_at_its_version():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split(" ")[0].split("==") for line in lines if line and not line.startswith("#"))
    here = installed("mixlens", EXTRAS, {})
    here.pop("mixlens", None)
    assert len(here) > 150
    assert {name: version for name, version in here.items() if pins.get(name) != version} == {}
