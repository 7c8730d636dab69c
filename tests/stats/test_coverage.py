"""A small draw of the table of coverage that benchmarks/coverage_of_intervals.py makes, and false alarms."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import mixlens as ml

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("coverage_of_intervals", BENCHMARKS / "coverage_of_intervals.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    module.MANY = 1500
    return module


NAMES = {"expert_share", "load_balance", "routing_entropy", "moved", "flips", "next_tokens", "impact"}


@pytest.fixture(scope="module")
def truths(benchmark: ModuleType) -> dict[str, np.ndarray]:
    return benchmark.truths_of(benchmark.CLUSTERING["strong"], NAMES)


@pytest.mark.parametrize("n", [3, 20])
def test_intervals_of_every_kind_hold_the_truth(benchmark, truths, n):
    rows = benchmark.coverage(n, benchmark.CLUSTERING["strong"], 64, truths, NAMES)
    assert len(rows) > 20
    shown = [row["coverage"] for row in rows if row["coverage"] is not None]
    assert min(shown) >= 0.84  # of 0.93, less three standard errors of 64 experiments
    assert 0.93 <= np.mean(shown) <= (1 if n < 20 else 0.985)


@pytest.mark.parametrize("n", [3, 8, 40])
@pytest.mark.parametrize("spread", [0.25, 1.0])
def test_where_nothing_is_to_be_found_there_is_no_alarm(n, spread):
    """Uniform routing whose documents differ: experts are alike, balance is perfect, domains mean nothing."""
    alarms: dict[str, list[np.ndarray]] = {"share": [], "cv": [], "max_over_mean": [], "excess": []}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        document = np.repeat(np.arange(n), rng.integers(20, 100, n))
        logits = rng.normal(0, spread, (n, 16, 8))[document] + rng.gumbel(size=(len(document), 16, 8))
        trace = ml.Trace.from_arrays(
            np.argsort(-logits, -1)[..., :2],
            n_experts=8,
            tokens={"sequence": document},
            sequences=pd.DataFrame({"domain": np.arange(n) % 2}),
        )
        share = ml.stats.expert_share(trace)
        alarms["share"].append((share.ci_low > 1 / 8) | (share.ci_high < 1 / 8))
        balance = ml.stats.load_balance(trace).ci_low
        alarms["cv"].append(balance.sel(measure="cv") > 0)
        alarms["max_over_mean"].append(balance.sel(measure="max_over_mean") > 1)
        alarms["excess"].append(ml.stats.domain_information(trace).ci_low.sel(measure="excess") > 0)
    for name, found in alarms.items():
        assert np.mean(found) <= 0.1, name  # 5 %, and three standard errors of 128 experiments
