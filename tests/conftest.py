"""Fixtures of all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import SHAPES, Letters, tiny_mixtral
from transformers import MixtralForCausalLM

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background without one
torch.set_num_threads(1)  # tiny models; threads of several test processes would wait for each other
settings.register_profile(
    "mixlens",
    deadline=None,  # no test asserts on elapsed time
    derandomize=True,  # the same examples in every run: a red suite is red for everybody
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("mixlens")
SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(params=list(SHAPES))
def model(request: pytest.FixtureRequest) -> MixtralForCausalLM:
    return tiny_mixtral(request.param)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Answers of servers are kept for one test: another one may be given the same port."""
    monkeypatch.setenv("MIXLENS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("the corpus (a folder named shared beside the repository) is not here")
    return SHARED
