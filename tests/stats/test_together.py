"""Statistics in one pass: the same numbers as one by one, from a trace that is read once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.refusals import refused

import mixlens as ml
from mixlens.stats import summaries
from mixlens.stats.together import _STATISTICS


def trace_of(n_tokens: int = 900) -> ml.Trace:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n_tokens, 3, 8)).astype(np.float32)
    order = np.argsort(-logits, axis=-1)[..., :2]
    chosen = np.exp(np.take_along_axis(logits, order, -1))
    documents = 30
    return ml.Trace.from_arrays(
        order,
        n_experts=8,
        weight=chosen / chosen.sum(-1, keepdims=True),
        router_logits=logits,
        tokens={"sequence": np.sort(rng.integers(0, documents, n_tokens)), "token_id": rng.integers(0, 9, n_tokens)},
        sequences=pd.DataFrame(
            {"document_id": np.arange(documents), "domain": [f"d{number % 3}" for number in range(documents)]}
        ),
    )


@pytest.mark.parametrize("by", [None, "domain"])
def test_one_pass_gives_the_numbers_of_each_alone(by, monkeypatch):
    trace = trace_of()
    names = [name for name in _STATISTICS if by or not name.startswith("domain")]
    alone = {name: getattr(ml.stats, name)(trace, **({"by": by} if by else {})) for name in names}
    several = {"predictability", "vocabulary_specialization"}
    reads, blocks = [], ml.Trace.blocks
    monkeypatch.setattr(ml.Trace, "blocks", lambda self, *a, **o: reads.append(a) or blocks(self, *a, **o))
    once = ml.stats.compute(trace, [name for name in names if name not in several], by=by)
    assert len(reads) == 1
    together = ml.stats.compute(trace, names, by=by)
    assert list(together) == names
    for name in names:
        xr.testing.assert_identical(together[name], alone[name])
        if name in once:
            xr.testing.assert_identical(once[name], alone[name])


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> ml.Trace:
    """One trace in five shards; documents have an uneven number of tokens."""
    whole = trace_of()
    parts = [whole.select(where=whole.sequences.index.to_series() // 6 == part) for part in range(5)]
    path = tmp_path_factory.mktemp("shards") / "run"
    return ml.concat(parts).save(path)


@pytest.mark.parametrize("executor", ["loky", "threading"])
def test_shards_counted_elsewhere_give_the_same_bits(on_disk, executor):
    assert len(on_disk.parts()) == 5
    names = ["coactivation", "transitions", "routing_entropy", "load_balance", "expert_share"]
    here = ml.stats.compute(on_disk, names, by="domain")
    there = ml.stats.compute(on_disk, names, by="domain", executor=executor)
    for name in names:
        xr.testing.assert_identical(there[name], here[name])
        xr.testing.assert_allclose(here[name], getattr(ml.stats, name)(trace_of(), by="domain"), rtol=1e-9)


def test_an_executor_that_joblib_does_not_know_is_refused(on_disk):
    with refused(ml.BadInput, "executor", "slurm"):
        ml.stats.compute(on_disk, ["expert_share"], executor="slurm")


def test_shards_are_read_where_they_lie(on_disk, monkeypatch, tmp_path):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert on_disk.path is not None
    store = fsspec.filesystem("memory")
    store.put(str(on_disk.path), "/bucket/run", recursive=True)
    there = ml.open("memory://bucket/run")
    assert isinstance(there, ml.Trace)
    assert not list(tmp_path.rglob("*.safetensors"))
    xr.testing.assert_identical(ml.stats.coactivation(there), ml.stats.coactivation(on_disk))
    store.rm("/bucket/run/routing-00002.safetensors")
    ml.stats.expert_share(ml.Trace.open("memory://bucket/run"))  # from the cache
    with refused(ml.RunError, "path", "memory://bucket/nothing/meta.json"):
        ml.open("memory://bucket/nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with refused(ml.RunError, "path", "memory://bucket/run/routing-00002.safetensors"):
        ml.stats.expert_share(ml.Trace.open("memory://bucket/run"))


@pytest.mark.parametrize("by", [None, "domain"])
@pytest.mark.parametrize("name", ["coactivation", "transitions"])
def test_layers_a_few_at_a_time_give_the_numbers_of_all_at_once(name, by, monkeypatch):
    whole = getattr(ml.stats, name)(trace_of(), by=by)
    monkeypatch.setattr(summaries, "_MOST_AT_A_TIME", 1)
    reads, blocks = [], ml.Trace.blocks
    monkeypatch.setattr(ml.Trace, "blocks", lambda self, *a, **o: reads.append(a) or blocks(self, *a, **o))
    xr.testing.assert_identical(getattr(ml.stats, name)(trace_of(), by=by), whole)
    assert len(reads) == whole.sizes["layer"]


def test_a_name_that_is_no_statistic_is_refused():
    with refused(ml.BadInput, "statistics"):
        ml.stats.compute(trace_of(), ["expert_share", "shares"])
    with refused(ml.BadInput, "statistics"):
        ml.stats.compute(trace_of(), [])
