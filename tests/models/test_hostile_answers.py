"""Answers that are too long, too slow, compressed to explode, or no HTTP: a named outcome, or an EndpointError."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from functools import cache

import pytest
from bytes_server import JSON, STREAM, whole, writing
from helpers.refusals import refused

import mixlens as ml
from mixlens.bench.events import outcome_of
from mixlens.bench.request import Timeouts
from mixlens.endpoints import limits
from mixlens.endpoints.compression import Decompressor
from mixlens.endpoints.limits import TooLarge
from mixlens.errors import BadInput, EndpointError

CHAT = {"choices": [{"message": {"content": "Two"}, "finish_reason": "stop"}]}
DEADLINE_S = 0.3


def forever(head: bytes, piece: bytes):
    return lambda: itertools.chain([head], itertools.repeat(piece))


def dripping(head: bytes):
    return lambda: itertools.chain([head], itertools.cycle([b"x", 0.01]))


@cache
def bomb() -> bytes:
    return gzip.compress(bytes(64 << 20))


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


HOSTILE = {
    "endless body": (forever(JSON + b"\r\n", b'["a",' * 10_000), "oversized"),
    "endless line": (forever(STREAM + b"\r\n", b"x" * 60_000), "oversized"),
    "endless event": (forever(STREAM + b"\r\n", b"data: x\n" * 5_000), "oversized"),
    "endless event of nothing": (forever(STREAM + b"\r\n", b"data:\n" * 5_000), "oversized"),
    "endless text": (forever(STREAM + b"\r\n", event("x" * 1_000_000)), "oversized"),
    "endless headers": (forever(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 1000 + b"\r\n"), "oversized"),
    "endless header": (forever(b"HTTP/1.1 200 OK\r\nX-A: ", b"b" * 10_000), "oversized"),
    "endless refusal": (forever(b"HTTP/1.1 400 Bad\r\n\r\n", b"no " * 10_000), "http"),
    "endless interim answers": (forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "timeout"),
    "bomb": (lambda: whole(JSON + b"Content-Encoding: gzip\r\n", bomb()), "oversized"),
    "bomb in a stream": (lambda: whole(STREAM + b"Content-Encoding: gzip\r\n", bomb()), "oversized"),
    "bomb in a bomb": (
        lambda: whole(JSON + b"Content-Encoding: gzip, gzip\r\n", gzip.compress(bomb())),
        "oversized",
    ),
    "many codings": (lambda: whole(JSON + b"Content-Encoding: " + b"gzip," * 9000 + b"gzip\r\n", b"x"), "truncated"),
    "another coding": (lambda: whole(JSON + b"Content-Encoding: compress\r\n", b"x"), "truncated"),
    "no gzip": (lambda: whole(JSON + b"Content-Encoding: gzip\r\n", b"not gzip"), "truncated"),
    "half of gzip": (
        lambda: whole(JSON + b"Content-Encoding: gzip\r\n", gzip.compress(json.dumps(CHAT).encode())[:20]),
        "malformed",
    ),
    "headers by the byte": (dripping(b"HTTP/1.1 200 OK\r\nX: "), "timeout"),
    "a body by the byte": (dripping(JSON + b"Content-Length: 100000\r\n\r\n"), "timeout"),
    "no HTTP": (lambda: [b"hello there\r\n\r\n"], "malformed"),
    "a body alone": (lambda: [json.dumps(CHAT).encode()], "connect"),
    "nothing": (lambda: [], "connect"),
    "a negative length": (lambda: [JSON + b"Content-Length: -5\r\n\r\n{}"], "malformed"),
    "two lengths": (lambda: [JSON + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}"], "malformed"),
    "a length too long": (lambda: [JSON + b"Content-Length: 999\r\n\r\n{}"], "truncated"),
    "no chunk": (lambda: [JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], "truncated"),
    "deep": (lambda: whole(JSON, b"[" * 100_000), "malformed"),
    "text of a number": (lambda: whole(JSON, b'{"choices":[{"text":5,"finish_reason":"stop"}]}'), "malformed"),
    "redirection": (
        lambda: [b"HTTP/1.1 307 X\r\nLocation: https://elsewhere.invalid/\r\nContent-Length: 0\r\n\r\n"],
        "http",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_named_on_every_path(name):
    writes, outcome = HOSTILE[name]
    quick = Timeouts(connect_s=5.0, stall_s=5.0, total_s=DEADLINE_S if outcome == "timeout" else 10.0)
    with writing(writes) as (url, requests):
        endpoint = ml.Endpoint(url, model="m", max_tries=1, deadline_s=quick.total_s)
        settings = ml.bench.BenchSettings(progress=False, warmup=0, timeouts=quick)
        [record] = ml.benchmark(endpoint, requests=1, workload=ml.bench.Workload(16, 8), settings=settings).records
        with pytest.raises(EndpointError):
            endpoint.complete("Hi")
    assert record.outcome == outcome
    assert record.detail
    assert record.events == () or outcome != "oversized"
    assert len(requests) == 2


@pytest.mark.parametrize("name", ["bomb", "headers by the byte", "redirection", "no HTTP"])
def test_probe_lists_and_prices_have_the_same_limits(name):
    with writing(HOSTILE[name][0]) as (url, _):
        endpoint = ml.Endpoint(url, model="m", max_tries=1, deadline_s=DEADLINE_S if "byte" in name else 10.0)
        calls = [endpoint.models, lambda: ml.bench.probe(endpoint)]
        calls += [] if "byte" in name else [lambda: ml.pricing.listed_prices("m", url=url)]
        for call in calls:
            with pytest.raises(EndpointError):
                call()


def test_a_stream_of_endless_events_is_too_large(monkeypatch):
    monkeypatch.setattr("mixlens.bench.events.MAX_EVENTS", 100)
    with writing(forever(STREAM + b"\r\n", b": x\n\n" * 50 + b"data: begun\n")) as (url, _):
        settings = ml.bench.BenchSettings(progress=False, warmup=0)
        endpoint = ml.Endpoint(url, model="m")
        [record] = ml.benchmark(endpoint, requests=1, workload=ml.bench.Workload(16, 8), settings=settings).records
    assert (record.outcome, record.events) == ("oversized", ())


def test_a_fault_after_the_end_of_an_answer_does_not_undo_it():
    done = event("a") + b"data: [DONE]\n\n"
    with writing(lambda: [STREAM + b"\r\n" + done, b"x" * (limits.MAX_BODY_BYTES + 1)]) as (url, _):
        settings = ml.bench.BenchSettings(progress=False, warmup=0)
        endpoint = ml.Endpoint(url, model="m")
        [record] = ml.benchmark(endpoint, requests=1, workload=ml.bench.Workload(16, 8), settings=settings).records
    assert (record.outcome, record.text) == ("ok", "a")
    assert outcome_of([], status=200, fault="oversized") == "oversized"


TEXT = b"".join(event(word) for word in ("Every", " token", " is", " sent")) * 300


def compressed(coding: str) -> bytes:
    raw = zlib.compressobj(wbits=-15)
    if coding in ("br", "zstd"):
        module = pytest.importorskip({"br": "brotli", "zstd": "zstandard"}[coding])
        return module.compress(TEXT)
    return {
        "gzip": lambda: gzip.compress(TEXT[:100]) + gzip.compress(TEXT[100:]),
        "deflate": lambda: zlib.compress(TEXT),
        "deflate, raw": lambda: raw.compress(TEXT) + raw.flush(),
    }[coding]()


@pytest.mark.parametrize("coding", ["gzip", "deflate", "deflate, raw", "br", "zstd"])
def test_every_coding_is_undone_however_it_is_cut(coding):
    data = compressed(coding)
    for size in (1, 7, len(data)):
        decompressor = Decompressor(coding.partition(",")[0])
        pieces = [out for at in range(0, len(data), size) for out in decompressor.feed(data[at : at + size])]
        assert b"".join(pieces) == TEXT


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_a_bomb_explodes_in_small_pieces_up_to_a_limit(coding, monkeypatch):
    monkeypatch.setattr("mixlens.endpoints.compression.MAX_STREAM_BYTES", 8 << 20)
    data = {"gzip": gzip.compress, "br": None, "zstd": None}[coding]
    data = data or pytest.importorskip({"br": "brotli", "zstd": "zstandard"}[coding]).compress
    exploding, largest = Decompressor(coding).feed(data(bytes(32 << 20))), 0
    with pytest.raises(TooLarge):  # noqa: PT012
        for piece in exploding:
            largest = max(largest, len(piece))
    assert 0 < largest <= 2 << 20


def test_certificates_of_the_environment_are_used_or_named(tmp_path, monkeypatch):
    endpoint = ml.Endpoint("https://127.0.0.1:9/v1", model="m")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with refused(BadInput, "SSL_CERT_FILE", str(tmp_path / "missing.pem")):
        endpoint.complete("Hi")
    (tmp_path / "broken.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "broken.pem"))
    with refused(BadInput, "SSL_CERT_FILE"):
        endpoint.complete("Hi")


@pytest.mark.parametrize("proxy", ["socks4://127.0.0.1:9", "ftp://127.0.0.1:9", "http://[::bad"])
def test_a_proxy_that_cannot_be_used_is_named_on_every_path(proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    endpoint = ml.Endpoint("https://service.invalid/v1", model="m", max_tries=1)
    settings = ml.bench.BenchSettings(progress=False, warmup=0)
    calls = (
        lambda: endpoint.complete("Hi"),
        endpoint.models,
        lambda: ml.bench.probe(endpoint),
        lambda: ml.benchmark(endpoint, requests=1, settings=settings),
    )
    for call in calls:
        with refused(BadInput, "proxy"):
            call()
