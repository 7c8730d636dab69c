"""Clocks and remarks of a benchmark against real servers with habits of their own."""

from __future__ import annotations

import gzip

import pytest
from bench_scripts import chunk, sse
from bench_server import Script, answer, serving
from bytes_server import JSON, STREAM, whole, writing

import mixlens as ml
from mixlens.bench.metrics import request_table
from mixlens.bench.session import BenchSettings
from mixlens.bench.shares import shares

QUIET = BenchSettings(progress=False, warmup=0)
SMALL = ml.bench.Workload(prompt_tokens=16, output_tokens=8)


def measured(pieces, *, requests=2, headers=None, **options):
    with serving(Script(pieces, headers=headers)) as url:
        endpoint = ml.Endpoint(url, model="m")
        return ml.benchmark(endpoint, requests=requests, workload=SMALL, settings=QUIET, **options)


def test_an_answer_ends_with_its_last_event_and_not_with_the_connection():
    bench = measured([*answer(), 1.0])
    table = bench.requests()
    assert table["outcome"].tolist() == ["ok", "ok"]
    assert (table["e2e_stream_s"] - table["e2e_token_s"]).max() < 0.5


def test_an_answer_without_a_last_event_ends_with_its_reason_and_counts():
    table = measured([*answer()[:-1], b": still here\n\n", 1.0]).requests()
    assert table["outcome"].tolist() == ["ok", "ok"]
    assert (table["e2e_stream_s"] - table["e2e_token_s"]).max() < 0.5


def test_a_compressed_stream_is_read():
    whole = gzip.compress(b"".join(piece for piece in answer(5) if isinstance(piece, bytes)))
    bench = measured([whole], headers={"Content-Encoding": "gzip"})
    assert bench.requests()["output_tokens"].tolist() == [10, 10]


EVENTS = b"".join(piece for piece in answer(5) if isinstance(piece, bytes))
CHUNKED = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (EVENTS[:99], EVENTS[99:]))
# {name: (what a server writes, outcome, form)}
WIRES = {
    "events under the name of JSON": (whole(JSON, EVENTS), "ok", "stream"),
    "events without a type": (whole(b"HTTP/1.1 200 OK\r\n", EVENTS), "ok", "stream"),
    "events under the name of a text": (
        whole(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n", EVENTS),
        "ok",
        "stream",
    ),
    "HTTP/1.0, until it closes": ([STREAM.replace(b"1.1", b"1.0") + b"\r\n", EVENTS], "ok", "stream"),
    "trailers": ([STREAM + b"Transfer-Encoding: chunked\r\n\r\n", CHUNKED, b"0\r\nX-Sum: 1\r\n\r\n"], "ok", "stream"),
    "closed within its length": ([STREAM + b"Content-Length: 9999\r\n\r\n", EVENTS[:199]], "truncated", "stream"),
    "closed behind its last event": ([STREAM + b"Content-Length: 9999\r\n\r\n", EVENTS], "ok", "stream"),
    "a whole answer under the name of events": (
        whole(STREAM, b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}'),
        "ok",
        "json",
    ),
    "lines of JSON": (
        whole(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n", b'{"a": 1}\n{"a": 2}\n'),
        "malformed",
        "json",
    ),
    "compressed and cut": (whole(STREAM + b"Content-Encoding: gzip\r\n", gzip.compress(EVENTS)[:150]), "truncated", ""),
    "no content": ([b"HTTP/1.1 204 No Content\r\n\r\n"], "empty", "stream"),
}


@pytest.mark.parametrize("name", WIRES)
def test_an_answer_is_what_its_bytes_are_whatever_its_headers_say(name):
    pieces, outcome, form = WIRES[name]
    with writing(lambda: pieces) as (url, _):
        bench = ml.benchmark(ml.Endpoint(url, model="m"), requests=1, workload=SMALL, settings=QUIET)
    [record] = bench.records
    assert (record.outcome, record.form) == (outcome, form or record.form), record.detail
    if outcome == "ok" and form == "stream":
        assert bench.requests()["output_tokens"].tolist() == [10]


def test_an_answer_that_is_not_streamed_has_no_time_to_a_first_token():
    body = b'{"choices": [{"message": {"content": "a b"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}'
    bench = measured([body], headers={"Content-Type": "application/json"})
    table = bench.requests()
    assert table["ttft_s"].isna().all()
    assert table["e2e_token_s"].notna().all()
    assert any("2 of 2" in remark for remark in shares(bench.records))


def test_a_redirection_is_named():
    with serving(Script([b"{}"], status=307, headers={"Location": "http://127.0.0.1:1/v2"})) as url:
        bench = ml.benchmark(ml.Endpoint(url, model="m"), requests=1, workload=SMALL, settings=QUIET)
    assert "http://127.0.0.1:1/v2" in bench.records[0].detail


def test_every_run_sends_prompts_of_its_own_unless_it_asks_for_the_same():
    script = Script(answer())
    with serving(script) as url:
        for reuse in (False, False, True, True):
            workload = ml.bench.Workload(16, 8, reuse_prompts=reuse)
            ml.benchmark(ml.Endpoint(url, model="m"), requests=3, workload=workload, settings=QUIET)
    sent = [body["messages"][0]["content"] for _, body in script.requests]
    assert len({*sent[:6]}) == 6
    assert sent[6:9] == sent[9:]


def cached(tokens: int):
    usage = {"prompt_tokens": 20, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": tokens}}
    return [*answer()[:-2], sse({"choices": [], "usage": usage}), sse("[DONE]")]


def test_runs_of_unlike_shares_of_cached_tokens_are_not_told_apart():
    cold, warm = measured(cached(0), requests=4), measured(cached(18), requests=4)
    compared = ml.compare(cold, warm)
    assert set(compared.overview()["different"]) == {"n/a"}
    assert any("90%" in remark for remark in warm.remarks())
    assert not ml.compare(cold, cold).unlike


@pytest.mark.parametrize(("finish", "told"), [("length", "length limit"), ("content_filter", "filter")])
def test_shares_of_answers_that_were_cut_are_told(finish, told):
    pieces = [sse(chunk({"content": "a"})), 0.002, sse(chunk({"content": "b"}, finish)), sse("[DONE]")]
    assert any(told in remark and "2 of 2" in remark for remark in measured(pieces).remarks())


def test_another_model_that_answers_is_told():
    pieces = [sse(chunk({"content": "a"}, model="other")), 0.002, sse(chunk({}, "stop", model="other")), sse("[DONE]")]
    assert any("other (2)" in remark for remark in measured(pieces).remarks())


def test_clumps_and_replays_are_told():
    clump = b"".join(sse(chunk({"content": f" {i}"})) for i in range(6))
    end = [sse(chunk({}, "stop")), sse("[DONE]")]
    assert any("clumps" in remark for remark in measured([clump, 0.05, clump, 0.05, clump, *end]).remarks())
    replayed = measured([clump, *end])
    assert request_table(replayed.records)["tpot_s"].isna().all()
    assert any("at once" in remark for remark in replayed.remarks())
