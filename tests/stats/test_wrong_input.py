"""Every statistic of traces says what it takes when it is given something else, before it reads a token."""

from __future__ import annotations

import inspect

import pytest
import xarray as xr
from helpers.refusals import refused

from mixlens import stats
from mixlens.errors import BadInput
from mixlens.trace.trace import Trace

_TRACES = ("trace", "a", "b", "b_with_ids", "b_with_weights")
OF_TRACES = {
    name: len([p for p in inspect.signature(function).parameters if p in _TRACES])
    for name in stats.__all__
    if inspect.isfunction(function := getattr(stats, name))
}
OF_TRACES["contrast"] = 2  # a and b are the groups of one trace
OF_A_STATISTIC = {"compute": {}, "contrast": {}, "null_model": {}, "plan": {"half_width": 0.1}, "simultaneous": {}}
OF_TRACES = {name: traces for name, traces in OF_TRACES.items() if traces}


def also_given(name: str) -> tuple:
    return (["expert_share"],) if name == "compute" else (stats.expert_share,) if name in OF_A_STATISTIC else ()


def test_the_statistics_of_traces_are_found():
    assert {"expert_share", "agreement", "moved", "predictability"} <= OF_TRACES.keys()
    assert len(OF_TRACES) > 12


@pytest.mark.parametrize("name", OF_TRACES)
@pytest.mark.parametrize("given", [None, "runs/pile", xr.Dataset()], ids=["nothing", "path", "dataset"])
def test_what_is_no_trace_is_refused(name, given):
    also = also_given(name) if name != "contrast" else ()
    with refused(BadInput, "trace", type(given).__name__):
        getattr(stats, name)(*[given] * OF_TRACES[name], *also, **OF_A_STATISTIC.get(name, {}))


@pytest.mark.parametrize("name", OF_TRACES)
def test_a_number_is_no_bootstrap(name):
    trace = Trace.from_arrays([[[0, 1]], [[1, 2]]], n_experts=4)
    with refused(BadInput, "bootstrap", 200):
        getattr(stats, name)(
            *[trace] * OF_TRACES[name], *also_given(name), **OF_A_STATISTIC.get(name, {}), bootstrap=200
        )
