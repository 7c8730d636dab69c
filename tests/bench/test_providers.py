"""Prices of now from a loopback copy of OpenRouter's list, and providers side by side."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from bench_samples import bench
from helpers.refusals import refused
from json_server import Call, Reply, answering

from mixlens.bench.bench import Bench
from mixlens.bench.prompts import read_prompts
from mixlens.cli import main as cli
from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.prices import STATEMENT, cost, prices
from mixlens.endpoints.probe import Probe, probe
from mixlens.errors import BadInput, EndpointError
from mixlens.pricing import providers
from mixlens.pricing.providers import listed_prices, provider_table

SMALL, LARGE = "mistralai/mixtral-8x7b-instruct", "mistralai/mixtral-8x22b-instruct"
# The documented form, its prices strings per token.
LISTING = {
    "data": {
        "id": SMALL,
        "endpoints": [
            {
                "name": "DeepInfra | mistralai/mixtral-8x7b-instruct",
                "context_length": 32768,
                "pricing": {"prompt": "0.00000054", "completion": "0.00000054", "request": "0", "discount": 0.1},
                "provider_name": "DeepInfra",
                "quantization": "fp8",
                "supported_parameters": ["tools", "temperature"],
                "uptime_last_30m": 99.5,
                "latency_last_30m": None,
                "throughput_last_30m": None,
            },
            {"name": "Elsewhere", "pricing": {"prompt": "-1", "completion": "free"}, "context_length": None},
        ],
    }
}


def test_strings_per_token_become_dollars_per_million():
    with answering(lambda call: Reply(LISTING)) as (url, calls):
        found = listed_prices("mistral/mixtral-8x7b-instruct", url=url)
    assert calls[0].path == f"/v1/models/{SMALL}/endpoints"
    first, second = found.to_dict("records")
    assert (first["input_usd_per_mtok"], first["output_usd_per_mtok"]) == pytest.approx((0.54, 0.54))
    assert (first["quantization"], first["context_tokens"]) == ("fp8", 32768)
    assert (first["parameters"], first["note"]) == ("tools, temperature", "discount 0.1; uptime 99.5 %")
    assert np.isnan([first["usd_per_call"], second["input_usd_per_mtok"], second["output_usd_per_mtok"]]).all()
    assert second["provider"] == "Elsewhere"
    assert found.attrs["date"] == first["as_of"]
    usd = cost(1000, 500, table=found)["usd"].tolist()
    assert usd == [pytest.approx(0.00081), pytest.approx(np.nan, nan_ok=True)]


@pytest.mark.parametrize(
    "payload", [{}, [], {"data": None}, {"data": {"endpoints": None}}, {"data": {"endpoints": [1]}}]
)
def test_a_list_of_another_form_is_said_to_be_one(payload):
    with answering(lambda call: Reply(payload)) as (url, _), refused(EndpointError, "answer"):
        listed_prices(SMALL, url=url)


def test_measured_listed_and_published_stand_side_by_side():
    with answering(lambda call: Reply(LISTING)) as (url, _):
        listed = listed_prices(SMALL, url=url)
    made = bench({"concurrency 1": [1.0, 2.0, 3.0]})
    table = provider_table({"DeepInfra": made}, model=SMALL, listed=listed)
    mine = table.iloc[0]
    assert (mine["kind"], mine["n"], mine["ttft_s"]) == ("measured", 3, pytest.approx(0.8))
    assert mine["ttft_s_low"] <= 0.8 <= mine["ttft_s_high"]
    assert "answered by DeepInfra" in mine["note"]
    assert (mine["load"], mine["source"]) == ("concurrency 1", "measured here at http://127.0.0.1:1/v1")
    page = table[(table["kind"] == "published") & (table["provider"] == "DeepInfra")].iloc[0]
    assert (page["output_tokens_per_s"], page["ttft_s"]) == (138, 0.288)
    assert table.query("kind == 'published'")["output_tokens_per_s"].dropna().tolist() == [138, 140]
    assert "context_tokens: 32768 or 33000" in page["contradicted"]
    assert "see its note" in page["contradicted"]


def test_every_load_is_a_row_with_what_was_charged_beside_the_list_price():
    made = bench({"concurrency 1": [1.0, 1.0], "concurrency 4": [2.0, 4.0]}, price_usd_per_mtok=(0.08, 0.24))
    # 11 tokens in and 29 out a request.
    billed = [replace(r, events=(*r.events[:-1], replace(r.events[-1], cost_usd=8e-6))) for r in made.records[:3]]
    table = provider_table({"here": Bench([*billed, made.records[3]], made.meta)}, model=SMALL)
    first, second = table.query("kind == 'measured'").to_dict("records")
    assert (first["load"], second["load"]) == ("concurrency 1", "concurrency 4")
    assert second["ttft_s"] == pytest.approx(3 * first["ttft_s"])
    assert first["list_usd_per_mtok"] == pytest.approx((11 * 0.08 + 29 * 0.24) / 40)
    assert first["charged_usd_per_mtok"] == second["charged_usd_per_mtok"] == pytest.approx(8e-6 / 40 * 1e6)
    assert "say what they cost" not in first["note"]
    assert "1 of 2 say what they cost" in second["note"]
    assert table.query("kind == 'published'")[["list_usd_per_mtok", "charged_usd_per_mtok"]].isna().all(axis=None)
    columns = list(table.columns)
    assert columns.index("charged_usd_per_mtok") == columns.index("list_usd_per_mtok") + 1
    unbilled = provider_table({"here": made}, model=SMALL).iloc[0]
    assert np.isnan(unbilled["charged_usd_per_mtok"])


def test_lists_and_pages_have_the_same_columns():
    with answering(lambda call: Reply(LISTING)) as (url, _):
        assert list(listed_prices(SMALL, url=url).columns) == list(prices(SMALL).columns) == list(STATEMENT)


def test_contradictions_are_shown_with_every_value():
    table = provider_table()
    large = table.query("model == @LARGE and provider == 'OpenRouter'")
    assert (large["contradicted"] == "input_usd_per_mtok: 0.4 or 2; output_usd_per_mtok: 1.2 or 6").all()
    assert (
        table.query("provider == 'ModelsLab'")["contradicted"].tolist()
        == ["priced by token and, at $0.54, by call"] * 2
    )
    assert table.query("model == @SMALL and provider == 'OpenRouter'")["contradicted"].tolist() == [""]
    assert (table["source"] != "").all()
    assert (table["as_of"] != "").all()


def test_providers_and_prices_of_now_on_the_command_line(capsys, monkeypatch):
    with answering(lambda call: Reply(LISTING)) as (url, _):
        monkeypatch.setattr(providers.listed_prices, "__kwdefaults__", {"url": url})
        workload = ["--input-tokens", "1000", "--output-tokens", "500", "--months", "2"]
        assert cli.main(["cost", *workload, "--model", SMALL, "--live", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [(row["month"], row["usd"]) for row in rows if row["provider"] == "DeepInfra"] == [
            (1, pytest.approx(0.00081)),
            (2, pytest.approx(0.00081)),
        ]
        made = bench({"concurrency 1": [1.0, 1.0], "concurrency 4": [2.0, 2.0]})
        monkeypatch.setattr(Bench, "open", lambda path: made)
        assert cli.main(["providers", "--live", "mine=run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"mine +measured +concurrency 4 +15\.6 \[.+?\] +800 \[.+?\]", text)
    assert "1. measured here at http://127.0.0.1:1/v1; 2026-01-01" in text
    assert "Contradicted: context_tokens: 32768 or 33000" in text
    assert "listed" in text
    assert "published" in text
    assert cli.main(["cost", *workload, "--live"]) == cli.EXIT_USAGE
    assert "--model" in capsys.readouterr().err
    assert cli.main(["providers", "run"]) == cli.EXIT_USAGE
    assert "NAME=RUN" in capsys.readouterr().err


def test_models_and_probe_on_the_command_line(capsys, tmp_path):
    def reply(call: Call) -> Reply:
        if call.method == "GET":
            return Reply({"data": [{"id": "mixtral"}]})
        return Reply({"choices": [{"message": {"content": "one two three"}}], "usage": {"completion_tokens": 3}})

    with answering(reply) as (url, _):
        assert cli.main(["models", url]) == 0
        assert capsys.readouterr().out == "mixtral\n"
        command = ["probe", url, "--model", "m", "--parameters", "stream,stop", "--out", str(tmp_path / "p.jsonl")]
        assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["parameter"], row["verdict"]) for row in rows] == [("stream", "ignored"), ("stop", "ignored")]
    kept = Probe.open(tmp_path / "p.jsonl")
    assert kept.verdicts == {"stream": "ignored", "stop": "ignored"}
    assert kept.exchanges[0].text == "one two three"


def test_what_a_probe_found_stands_in_the_table(tmp_path, capsys, monkeypatch):
    table = pd.DataFrame(
        [("stop", "honoured", "", 2), ("seed", "ignored", "", 2), ("top_p", "honoured", "", 2)],
        columns=["parameter", "verdict", "evidence", "requests"],
    )
    Probe(table, (), {"endpoint": {}}).save(tmp_path / "p.jsonl")
    monkeypatch.setattr(Bench, "open", lambda path: bench({"concurrency 1": [1.0, 1.0]}))
    assert cli.main(["providers", "mine=run", "--probe", f"mine={tmp_path / 'p.jsonl'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["parameters"] == "stop, top_p"
    for wrong, named in (
        (["--probe", f"other={tmp_path / 'p.jsonl'}"], "other=RUN"),
        (["--probe", "mine=nothing"], "nothing"),
        (["--csv", str(tmp_path / "no" / "x.csv")], "x.csv"),
    ):
        assert cli.main(["providers", "mine=run", *wrong]) == cli.EXIT_USAGE
        assert named in capsys.readouterr().err


def test_a_probe_that_could_not_be_kept_sends_nothing(tmp_path):
    with answering(lambda call: Reply({})) as (url, calls), refused(BadInput, "out"):
        probe(Endpoint(url, model="m"), out=tmp_path / "no" / "p.jsonl")
    assert not calls


def test_prompts_come_from_files_and_data_sets(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "uno"}\n{"text": "two", "body": "dos"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    assert read_prompts(str(tmp_path / "a.jsonl"), column="body") == ["uno", "dos"]
    assert read_prompts(["one", {"text": "two"}]) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{oops\n')
    for wrong, named in (
        (tmp_path / "b.jsonl", ("path", 2)),
        (tmp_path / "none.txt", ("path",)),
        ([{"body": "x"}], ("column", 0)),
        ([" "], ("column", 0)),
    ):
        with refused(BadInput, *named):
            read_prompts(wrong)


def test_prompts_of_a_dataset():
    import datasets

    assert read_prompts(datasets.Dataset.from_dict({"text": ["one", "two"]})) == ["one", "two"]
