"""The snapshot of prices, and what a workload costs."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.prices import cost, price_at, prices
from mixlens.errors import BadInput

SMALL, LARGE = "mistralai/mixtral-8x7b-instruct", "mistralai/mixtral-8x22b-instruct"


def test_a_thousand_in_and_five_hundred_out():
    table = cost(1000, 500).groupby(["provider", "model"])["usd"].agg(list)
    assert table["OpenRouter", SMALL] == [pytest.approx(0.00020)]
    assert table["OpenRouter", LARGE] == [pytest.approx(0.00100), pytest.approx(0.00500)]
    assert table["DeepInfra", SMALL] == [pytest.approx(0.00081)]
    assert table["not named", SMALL] == [pytest.approx(0.00084)]


def test_statements_that_contradict_each_other_are_all_there():
    modelslab = prices(SMALL).set_index("provider").loc["ModelsLab"]
    assert modelslab["input_usd_per_mtok"].tolist() == [0.54, pytest.approx(np.nan, nan_ok=True)]
    assert modelslab["usd_per_call"].tolist() == [pytest.approx(np.nan, nan_ok=True), 0.54]
    assert cost(1000, 500, requests=10, model=SMALL).set_index("provider").loc["ModelsLab", "usd"].tolist() == [
        pytest.approx(0.0081),
        pytest.approx(5.4),
    ]


def test_every_statement_has_its_source_and_date():
    table = prices()
    assert (table["source"] != "").all()
    assert (table["as_of"] != "").all()
    assert table.attrs["date"]
    deepinfra = table[table["provider"] == "DeepInfra"].iloc[0]
    assert (deepinfra["output_tokens_per_s"], deepinfra["ttft_s"], deepinfra["quantization"]) == (138, 0.288, "fp8")


def test_every_published_price_speed_and_context_is_there():
    """Line by line as the sources' copies have them."""
    table = prices().drop(columns=["source", "note", "parameters"]).astype(object).fillna("")
    columns = ["input_usd_per_mtok", "output_usd_per_mtok", "usd_per_call", "output_tokens_per_s", "ttft_s"]
    told = {tuple(row) for row in table[["provider", "model", *columns, "context_tokens"]].to_numpy().tolist()}
    assert told == {
        ("OpenRouter", SMALL, 0.08, 0.24, "", "", "", 32768),
        ("OpenRouter", LARGE, 0.40, 1.20, "", "", "", 65536),
        ("OpenRouter", LARGE, 2.0, 6.0, "", "", "", 65536),
        ("DeepInfra", SMALL, 0.54, 0.54, "", 138, 0.288, 33000),
        ("not named", SMALL, 0.54, 0.60, "", 140, "", ""),
        ("ModelsLab", SMALL, 0.54, 0.54, "", "", "", ""),
        ("ModelsLab", SMALL, "", "", 0.54, "", "", ""),
    }


def test_months_grow():
    table = cost(1000, 500, requests=100, model="mistral/mixtral-8x7b-instruct", months=3, growth=0.5)
    openrouter = table[table["provider"] == "OpenRouter"]
    assert openrouter["requests"].tolist() == [100, 150, 225]
    assert openrouter["usd"].tolist() == pytest.approx([0.02, 0.03, 0.045])


def test_the_cap_reckons_with_the_dearest_statement():
    assert price_at(Endpoint.openrouter(LARGE)) == (2.0, 6.0)
    assert price_at(Endpoint.deepinfra()) == (0.54, 0.54)
    assert price_at(Endpoint("http://127.0.0.1:1/v1", model=SMALL)) is None


def test_what_cannot_be_reckoned():
    with refused(BadInput, "cost", (-1, 500, 1, 1, 0.0)):
        cost(-1, 500)
    for wrong in ({"months": 0}, {"months": 10**6}, {"growth": 1e9, "months": 100}, {"requests": float("nan")}):
        with refused(BadInput, "cost"):
            cost(1, 500, **wrong)
    with refused(BadInput, "model", "gpt-2"):
        cost(1, 1, model="gpt-2")
