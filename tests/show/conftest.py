from __future__ import annotations

import pytest
import xarray as xr
from lab import CHROMIUM, FLAGS, Lab, watched
from show_samples import make_trace, share_of

from mixlens.trace.trace import Trace


@pytest.fixture(scope="session")
def trace() -> Trace:
    return make_trace()


@pytest.fixture(scope="session")
def share(trace) -> xr.Dataset:
    return share_of(trace)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there; apt-get install chromium")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=str(CHROMIUM),
            args=FLAGS,
            viewport={"width": 1200, "height": 1000},
        )
        yield browser
        browser.close()


@pytest.fixture
def seen(chromium):
    page = chromium.new_page()
    yield watched(page)
    page.close()


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    server = Lab(tmp_path_factory.mktemp("books"), tmp_path_factory.mktemp("home"))
    page = chromium.new_page()
    server.wait(page)
    page.close()
    yield server
    server.stop()
