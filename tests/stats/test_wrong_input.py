"""Every statistic of traces says what it takes when it is given something else, before it reads a token."""

from __future__ import annotations

import inspect

import pytest
import xarray as xr

from mixlens import stats
from mixlens.errors import BadInput
from mixlens.traces.trace import Trace

OF_TRACES = {
    name: len([p for p in inspect.signature(function).parameters if p in ("trace", "a", "b")])
    for name in stats.__all__
    if inspect.isfunction(function := getattr(stats, name))
}
OF_TRACES = {name: traces for name, traces in OF_TRACES.items() if traces}


def test_the_statistics_of_traces_are_found():
    assert {"expert_share", "agreement", "moved", "predictability"} <= OF_TRACES.keys()
    assert len(OF_TRACES) > 12


@pytest.mark.parametrize("name", OF_TRACES)
@pytest.mark.parametrize("given", [None, "runs/pile", xr.Dataset()], ids=["nothing", "path", "dataset"])
def test_what_is_no_trace_is_refused_by_name(name, given):
    with pytest.raises(BadInput, match=rf"^{name} was asked for. It takes a trace, and a {type(given).__name__} "):
        getattr(stats, name)(*[given] * OF_TRACES[name])


@pytest.mark.parametrize("name", OF_TRACES)
def test_a_number_is_no_bootstrap(name):
    trace = Trace.from_arrays([[[0, 1]], [[1, 2]]], n_experts=4)
    with pytest.raises(BadInput, match=rf"^{name} was asked for with bootstrap=200. It takes a Bootstrap."):
        getattr(stats, name)(*[trace] * OF_TRACES[name], bootstrap=200)
