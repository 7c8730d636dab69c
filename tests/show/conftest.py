from __future__ import annotations

import pytest
import xarray as xr
from show_samples import make_trace, share_of

from mixlens.traces.trace import Trace


@pytest.fixture(scope="session")
def trace() -> Trace:
    return make_trace()


@pytest.fixture(scope="session")
def share(trace) -> xr.Dataset:
    return share_of(trace)
