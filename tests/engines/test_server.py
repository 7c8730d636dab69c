"""Routing from servers: equal to what the same model records here, and refused where it cannot be that."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.routing_server import FORMS, serving
from transformers import AutoTokenizer

import mixlens as ml
from mixlens.engines.check import FAULTS
from mixlens.models.demo import demo_path

QUIET = ml.RecordSettings(progress=False, max_length=60, overlong="truncate")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_path())


@pytest.fixture(scope="module")
def documents():
    return [{"text": d["text"], "domain": d["domain"]} for d in ml.demo_documents()[:3]]


@pytest.fixture(scope="module")
def here(demo, documents):
    return ml.record(demo, documents, settings=QUIET)


def endpoint(url, **fields):
    return ml.Endpoint(url, model="served", **{"protocol": "openai-completions", "routing": True, **fields})


@pytest.mark.parametrize("form", FORMS)
def test_a_server_gives_the_trace_that_the_model_gives_here(form, demo, tokenizer, documents, here):
    with serving(demo, tokenizer, form) as (url, _):
        there = ml.record(endpoint(url), documents, settings=QUIET)
    for name in ("sequence", "position", "token_id", "phase", "expert_id"):
        assert np.array_equal(there.read(name), here.read(name)), name
    assert there.meta["source_check"]["rows"] == there.n_tokens
    assert ("logprob" in there.signals) == form.startswith("vllm")
    if "logprob" in there.signals:
        assert np.allclose(there.read("logprob"), here.read("logprob"), atol=1e-5, equal_nan=True)
    ours, theirs = (ml.stats.expert_share(trace, by="domain") for trace in (here, there))
    assert ours["estimate"].equals(theirs["estimate"])
    with refused(ml.MissingSignal, "router_logits", "routing_entropy"):
        ml.stats.routing_entropy(there)


def test_a_run_on_disk_resumes_and_says_what_was_checked(demo, tokenizer, documents, here, tmp_path):
    settings = ml.RecordSettings(progress=False, max_length=60, overlong="truncate", shard_tokens=60)
    served = 0

    def fails_in_the_second_shard(ids):
        nonlocal served
        served += 1
        return ids if served != 2 else ids[:-1]

    with serving(demo, tokenizer, spoil=fails_in_the_second_shard) as (url, calls):
        with refused(ml.SourceError, "missing_rows", "59 rows came for 60 tokens"):
            ml.record(endpoint(url), documents, out=tmp_path / "run", settings=settings)
        trace = ml.record(endpoint(url), documents, out=tmp_path / "run", settings=settings)
        asked = [call for call in calls if call.method == "POST"]
    assert len(asked) == len(documents) + 1
    assert np.array_equal(ml.open(tmp_path / "run").read("expert_id"), here.read("expert_id"))
    assert trace.meta["source_check"]["requests"] == len(documents)


@pytest.mark.slow
def test_a_report_of_a_trace_without_weights_says_what_was_corrected(demo, tokenizer, documents, tmp_path):
    with serving(demo, tokenizer, spoil=lambda ids: np.concatenate([ids, 0 * ids[:1]])) as (url, _):
        trace = ml.record(endpoint(url), documents, settings=QUIET)
    assert trace.meta["source_check"]["corrected"] == {"last_token": len(documents)}
    page = Path(ml.report(trace, tmp_path / "report.html")).read_text()
    assert FAULTS["last_token"] in page
    assert FAULTS["padding"] not in page


def test_signals_that_a_server_cannot_tell_are_refused(demo, tokenizer, documents):
    with serving(demo, tokenizer) as (url, calls):
        with refused(ml.MissingSignal, "router_logits", "a server at 127.0.0.1"):
            ml.record(endpoint(url), documents, signals=["router_logits"], settings=QUIET)
        assert not [call for call in calls if call.method == "POST"]


def test_a_server_without_routing_is_refused(demo, tokenizer, documents):
    with serving(demo, tokenizer) as (url, _), refused(ml.SourceError, "routing", None):
        ml.record(endpoint(url, extra={"return_routed_experts": None, "return_token_ids": None}), documents)


@pytest.mark.parametrize(
    ("fields", "argument"), [({"routing": False}, "routing"), ({"protocol": "openai-chat"}, "protocol")]
)
def test_an_endpoint_that_cannot_be_recorded_is_refused(fields, argument):
    with pytest.raises(ml.BadInput) as error:
        ml.record(endpoint("http://127.0.0.1:9/v1", **fields), ["text"])
    assert error.value.argument == argument


def test_routing_is_asked_for_in_the_formats_that_have_it():
    with refused(ml.BadInput, "routing", "anthropic"):
        endpoint("http://127.0.0.1:9/v1", protocol="anthropic")
    _, body = endpoint("http://127.0.0.1:9/v1").request([1, 2, 3], max_tokens=1)
    assert body["prompt"] == [1, 2, 3]
    assert body["return_routed_experts"]
    assert body["return_token_ids"]
    assert "return_token_ids" not in endpoint("http://127.0.0.1:9/v1", routing=False).request("a", max_tokens=1)[1]


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_a_benchmark_keeps_the_routing_of_its_requests(form, demo, tokenizer, tmp_path):
    workload = ml.bench.Workload(16, 3, prompts=["Once upon a time", "He opened the door"])
    settings = ml.bench.BenchSettings(progress=False, warmup=0)
    with serving(demo, tokenizer, form) as (url, _):
        bench = ml.benchmark(endpoint(url), requests=2, workload=workload, settings=settings, out=tmp_path / "run")
    assert bench.succeeded == 2
    routing = ml.open(tmp_path / "run").routing
    assert len(routing.sequences) == 2
    for number, prompt in enumerate(("Once upon a time", "He opened the door")):
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            for _ in range(2):
                ids.append(int(demo(torch.tensor([ids])).logits[0, -1].argmax()))
            with ml.Recorder(demo, signals=[]) as recorder:
                demo(torch.tensor([ids]))
        found = routing.select(where={"index": number})
        assert np.array_equal(found.read("expert_id"), recorder.trace().read("expert_id"))
        assert found.read("phase").sum() == 2


def test_a_benchmark_is_kept_where_its_routing_is_refused(demo, tokenizer):
    settings = ml.bench.BenchSettings(progress=False, warmup=0)
    with serving(demo, tokenizer, spoil=lambda ids: ids[1:]) as (url, _):
        bench = ml.benchmark(endpoint(url), requests=2, workload=ml.bench.Workload(16, 3), settings=settings)
    assert bench.succeeded == 2
    assert bench.routing is None
    assert "missing_rows" in bench.meta["routing"]
