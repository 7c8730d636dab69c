"""Statistics in one pass: the same numbers as one by one, from a trace that is read once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.refusals import refused

import mixlens as ml
from mixlens.stats import counts
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


@pytest.mark.parametrize("by", [None, "domain"])
@pytest.mark.parametrize("name", ["coactivation", "transitions"])
def test_layers_a_few_at_a_time_give_the_numbers_of_all_at_once(name, by, monkeypatch):
    whole = getattr(ml.stats, name)(trace_of(), by=by)
    monkeypatch.setattr(counts, "_MOST_AT_A_TIME", 1)
    reads, blocks = [], ml.Trace.blocks
    monkeypatch.setattr(ml.Trace, "blocks", lambda self, *a, **o: reads.append(a) or blocks(self, *a, **o))
    xr.testing.assert_identical(getattr(ml.stats, name)(trace_of(), by=by), whole)
    assert len(reads) == whole.sizes["layer"]


def test_a_name_that_is_no_statistic_is_refused():
    with refused(ml.BadInput, "statistics"):
        ml.stats.compute(trace_of(), ["expert_share", "shares"])
    with refused(ml.BadInput, "statistics"):
        ml.stats.compute(trace_of(), [])
