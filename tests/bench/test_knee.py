"""The sweep that finds the knee, on servers whose capacity is known."""

from __future__ import annotations

import numpy as np
import pytest
from bench_samples import META, bench, record
from bench_server import Script, answer, serving
from helpers.refusals import refused

from mixlens.bench.bench import Bench
from mixlens.bench.prompts import Workload
from mixlens.bench.session import BenchSettings
from mixlens.bench.sweep import knee, load_sweep
from mixlens.endpoints.endpoint import Endpoint
from mixlens.errors import BadInput

QUIET = BenchSettings(progress=False, max_seconds=60.0)
SMALL = Workload(prompt_tokens=16, output_tokens=8)


def served(places: int, capacity: int, n: int, start: float) -> list:
    """A closed loop of so many places at a server that works on `capacity` requests at once: the others wait."""
    slower = max(places / capacity, 1.0)
    return [
        record(i, f"concurrency {places}", slower=slower, start=start + 1.5 * slower * (i // places)) for i in range(n)
    ]


def test_the_knee_is_where_the_server_is_full():
    records = [r for i, places in enumerate((1, 2, 4, 8, 16)) for r in served(places, 4, 32, 1000.0 * i)]
    found = knee(Bench(records, META)).set_index("level")
    assert found.index[found["knee"]].tolist() == ["concurrency 4"]
    assert found.loc["concurrency 4", "chosen_frac"] == 1.0
    for level, places in (("concurrency 1", 1), ("concurrency 8", 8)):
        rate = min(places, 4) * 29 / 1.5
        assert found.loc[level, "tokens_per_s"] == pytest.approx(rate, rel=0.01)
        assert found.loc[level, "power"] == pytest.approx(rate / (1.3 * max(places / 4, 1)), rel=0.01)


def test_noise_is_said_to_be_noise():
    draw = np.random.default_rng(0)
    made = bench({f"concurrency {n}": list(draw.uniform(1, 3, 8)) for n in (1, 2)})
    found = knee(made)
    assert 0.02 < found["chosen_frac"].min() < 0.5
    assert found["chosen_frac"].sum() == pytest.approx(1.0)
    nothing = knee(Bench([record(0, outcome="http", events=())], META))
    assert nothing["power"].isna().all()
    assert not nothing["knee"].any()


def test_a_sweep_goes_on_until_more_load_is_only_waiting(tmp_path):
    script = Script(answer(wait=0.03))
    script.places = 2
    with serving(script) as url:
        made = load_sweep(
            Endpoint(url, model="m"), most=64, requests=6, out=tmp_path / "run", workload=SMALL, settings=QUIET
        )
        again = load_sweep(
            Endpoint(url, model="m"), most=64, requests=6, out=tmp_path / "run", workload=SMALL, settings=QUIET
        )
    measured = made.requests().query("phase == 'measured'").groupby("level", sort=False).size()
    assert 3 <= len(measured) < 7
    assert (measured >= [max(6, 2 * int(level.split()[1])) for level in measured.index]).all()
    assert again.records == made.records
    with refused(BadInput, "most", 0):
        load_sweep(Endpoint("http://127.0.0.1:9/v1", model="m"), most=0)


def test_a_sweep_ends_where_nothing_succeeds():
    refusal = Script([b"{}"], status=503)
    with serving(refusal) as url:
        made = load_sweep(Endpoint(url, model="m"), requests=2, workload=SMALL, settings=QUIET)
    assert {record.level for record in made.records} == {"concurrency 1"}
