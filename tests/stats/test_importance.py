"""The importance map against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from helpers.refusals import refused

from mixlens import BadInput
from mixlens.stats import Bootstrap, expert_importance

DOCUMENTS, LAYERS, EXPERTS = 40, 3, 4


@pytest.fixture
def measured() -> xr.Dataset:
    random = np.random.default_rng(0)
    tokens = random.integers(5, 60, DOCUMENTS)
    tokens[7] = 0  # a document of one token predicts nothing
    change = random.normal(0.1, 0.02, (DOCUMENTS, LAYERS, EXPERTS)) * tokens[:, None, None]
    change[:20, 1, 2] += 0.5 * tokens[:20, None][:, 0]
    chosen = random.integers(0, 10, (DOCUMENTS, LAYERS, EXPERTS))
    inner = ("document", "layer", "expert")
    return xr.Dataset(
        {
            "change": (inner, change),
            "chosen": (inner, chosen),
            "value": ("document", 3.0 * tokens),
            "tokens": ("document", tokens),
            "length": ("document", tokens + 1),
        },
        coords={
            "document_id": ("document", np.arange(DOCUMENTS).astype(object)),
            "domain": ("document", np.array(["code"] * 20 + ["prose"] * 20, dtype=object)),
            "layer": [0, 2, 5],
            "expert": range(EXPERTS),
        },
        attrs={"kind": "importance", "model": "tiny", "metric": "loss", "unit": "nats", "how": "reroute", "top_k": 2},
    )


def test_estimates_are_sums_over_documents(measured):
    data = expert_importance(measured, by="domain")
    assert data.estimate.dims == ("domain", "layer", "expert")
    for domain in ("code", "prose"):
        here = np.flatnonzero(measured.domain.values == domain)
        n = sum(int(measured.tokens.values[d]) for d in here)
        assert data.n.sel(domain=domain) == n
        assert data.value.sel(domain=domain) == pytest.approx(3.0)
        for i, layer in enumerate((0, 2, 5)):
            for expert in range(EXPERTS):
                cell = data.sel(domain=domain, layer=layer, expert=expert)
                assert cell.estimate == pytest.approx(sum(measured.change.values[d, i, expert] for d in here) / n)
                counted = [d for d in here if measured.tokens.values[d] > 0]
                chosen = sum(int(measured.chosen.values[d, i, expert]) for d in counted)
                assert cell.share == pytest.approx(chosen / (2 * sum(int(measured.length.values[d]) for d in counted)))
                assert cell.ci_low < cell.estimate < cell.ci_high
    assert data.n_documents.values.tolist() == [19, 20]
    apart = data.sel(layer=2, expert=2)
    assert apart.ci_low.sel(domain="code") > apart.ci_high.sel(domain="prose")


def test_without_groups_and_with_the_same_seed(measured):
    one, other = (expert_importance(measured, bootstrap=Bootstrap(seed=s, replicates=200)) for s in (3, 3))
    assert one.estimate.dims == ("layer", "expert")
    xr.testing.assert_identical(one, other)
    assert one.attrs["level"] == 0.95


def test_one_document_has_no_interval(measured):
    data = expert_importance(measured.isel(document=[3]))
    assert np.isfinite(data.estimate).all()
    assert np.isnan(data.ci_low).all()


def test_columns_that_documents_lack_are_refused(measured):
    with refused(BadInput, "by", "language"):
        expert_importance(measured, by="language")
    measured.domain.values[2] = None
    with refused(BadInput, "domain"):
        expert_importance(measured, by="domain")
