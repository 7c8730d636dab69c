"""Benchmarks of real servers on loopback: loads, caps, every fault, and what stays on disk."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import numpy as np
import pytest
from bench_scripts import chunk, sse
from bench_server import CUT, Script, answer, serving
from helpers.refusals import refused

import mixlens
from mixlens.bench.bench import Bench
from mixlens.bench.events import read_records
from mixlens.bench.load_generator import Caps, Level
from mixlens.bench.prompts import Workload
from mixlens.bench.record_sink import PARTIAL
from mixlens.bench.request import Job, Timeouts
from mixlens.bench.run import BenchSettings, benchmark
from mixlens.endpoints.endpoint import Endpoint
from mixlens.errors import BadInput

KEY = "sk-loopback-0123456789"
SMALL = Workload(prompt_tokens=16, output_tokens=8)
TIMEOUTS = Timeouts(connect_s=0.3, stall_s=0.3, total_s=2.0)
QUIET = BenchSettings(progress=False, timeouts=TIMEOUTS, max_seconds=20.0)


def settings(**fields) -> BenchSettings:
    return BenchSettings(**{**vars(QUIET), **fields})


def measured(url: str, **fields) -> Bench:
    endpoint = fields.pop("endpoint", None) or Endpoint(url, model="m")
    return benchmark(endpoint, **{"requests": 2, "workload": SMALL, "settings": QUIET, **fields})


def test_a_closed_loop_is_measured_and_kept(tmp_path):
    script = Script(answer())
    with serving(script) as url:
        bench = measured(url, concurrency=(1, 3), requests=6, out=tmp_path / "run")
    assert script.most_active == 3
    assert len(script.requests) == 6 + 1 + 6 + 3
    assert bench.succeeded == 12
    table = bench.table().set_index(["level", "metric", "statistic"])
    assert table.loc[("concurrency 1", "ttft_s", "p50"), "n"].item() == 6
    assert 0.001 < table.loc[("concurrency 3", "ttft_s", "p50"), "estimate"].item() < 2.0
    assert table.loc[("concurrency 3", "system_output_tokens_per_s", "rate"), "estimate"].item() > 0
    rows = bench.requests()
    assert rows["output_tokens"].tolist() == [6] * 16
    assert rows["input_tokens"].tolist() == [20] * 16
    assert rows.query("phase == 'warm-up'")["connect_s"].notna().sum() >= 1
    prompts = [body["messages"][0]["content"] for _, body in script.requests]
    assert len({*prompts}) == len(prompts)
    opened = mixlens.open(tmp_path / "run")
    assert isinstance(opened, Bench)
    assert opened.records == bench.records
    assert not (tmp_path / "run" / PARTIAL).exists()
    assert opened.meta["workload"] == SMALL.plan()
    assert "Workload: prompts of 16 words, answers of at most 8 tokens." in repr(opened)
    assert "usage (12 requests)" in repr(opened)
    assert "4 requests, the first with TTFT" in repr(opened)
    assert "concurrency 3" in opened._repr_html_()
    assert (
        benchmark(
            Endpoint(url, model="m"),
            concurrency=(1, 3),
            requests=6,
            out=tmp_path / "run",
            workload=SMALL,
            settings=QUIET,
        ).records
        == bench.records
    )


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_an_open_loop_counts_from_when_requests_were_due(arrivals):
    script = Script(answer(wait=0.03))
    with serving(script) as url:
        bench = measured(url, rate=40, requests=8, settings=settings(arrivals=arrivals, warmup=0))
    assert script.most_active > 1
    rows = bench.requests()
    assert set(rows["level"]) == {f"{arrivals} 40/s"}
    due = np.diff(sorted(record.scheduled_s for record in bench.records))
    expected = [1 / 40] * 7 if arrivals == "constant" else np.diff(Level(rate=40.0).due(8, SMALL.seed))
    assert due == pytest.approx(expected)
    assert (rows["scheduled_ttft_s"] >= rows["ttft_s"]).all()


def test_poisson_arrivals_have_their_rate_and_repeat():
    level = Level(rate=50.0)
    due = level.due(4000, 0)
    assert due == level.due(4000, 0)
    gaps = np.diff(due)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)


FAULTS = {
    "429 with Retry-After": (
        Script([b'{"error":{"message":"slow"}}'], status=429, headers={"Retry-After": "7"}),
        "http",
    ),
    "429": (Script([b'{"error":{"message":"slow"}}'], status=429), "http"),
    "402": (Script([b'{"error":{"message":"pay"}}'], status=402), "http"),
    "422": (Script([b'{"detail":"unknown field"}'], status=422), "http"),
    "500": (Script([b"<html>oops</html>"], status=500), "http"),
    "503": (Script([], status=503), "http"),
    "302": (Script([], status=302, headers={"Location": "http://127.0.0.1:9/"}), "http"),
    "stall": (Script([sse(chunk({"content": "a"})), 0.8]), "timeout"),
    "stall before the answer": (Script([0.8]), "timeout"),
    "cut mid-token": (Script([sse(chunk({"content": "a"})), sse(chunk({"content": "b"}))[:25], CUT]), "truncated"),
    "ended mid-token": (Script([sse(chunk({"content": "a"})), sse(chunk({"content": "b"}))[:25]]), "truncated"),
    "error inside": (Script([sse(chunk({"content": "a"})), sse({"error": {"code": 502, "message": "gone"}})]), "error"),
    "error body": (
        Script([b'{"status":"error","message":"no"}'], headers={"Content-Type": "application/json"}),
        "error",
    ),
    "malformed": (Script([sse(chunk({"content": "a"})), sse("{oops"), sse("[DONE]")]), "malformed"),
    "page": (Script([b"<html>"], headers={"Content-Type": "text/html"}), "malformed"),
    "empty": (Script([sse(chunk({"role": "assistant"})), sse("[DONE]")]), "empty"),
    "no usage": (Script([sse(chunk({"content": "a b"})), 0.002, sse(chunk({"content": " c"}, "stop"))]), "ok"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_ends_in_its_outcome_once_and_stays_on_disk(name, tmp_path):
    script, outcome = FAULTS[name]
    script.requests.clear()
    with serving(script) as url:
        bench = measured(url, requests=1, out=tmp_path / "run", settings=settings(warmup=0))
    assert len(script.requests) == 1
    [record] = read_records(tmp_path / "run" / "results.jsonl")
    assert record == bench.records[0]
    assert record.outcome == outcome
    assert record.retry_after_s == (7.0 if "Retry" in name else None)
    if outcome == "ok":
        assert bench.requests()["token_source"].tolist() == ["chunks"]
        return
    assert record.detail
    assert bench.succeeded == 0
    assert bench.summary().estimate.isnull().all()
    assert "n/a" in bench.overview().iloc[0].tolist()
    if "mid-token" in name or name == "stall":
        assert record.text == "a"
    assert "the first" not in repr(bench)


def test_refused_connections_and_failed_encryption():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    refused = measured(f"http://127.0.0.1:{port}/v1", settings=settings(warmup=0))
    assert [record.outcome for record in refused.records] == ["connect", "connect"]
    with serving(Script(answer())) as url:
        plain = measured(url.replace("http:", "https:"), settings=settings(warmup=0))
    assert {record.outcome for record in plain.records} == {"tls"}
    assert "SSL" in plain.records[0].detail


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_counts_where_the_environment_vouches_for_it(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    script = Script(answer())
    with serving(script, tls=context) as url:
        [record] = measured(url, requests=1, settings=settings(warmup=0)).records
    assert (record.outcome, script.requests) == ("tls", [])
    assert "CERTIFICATE_VERIFY_FAILED" in record.detail
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(script, tls=context) as url:
        [record] = measured(url, requests=1, settings=settings(warmup=0)).records
    assert record.outcome == "ok"


def test_a_stream_that_never_ends_is_timed_out_in_spite_of_keep_alives():
    script = Script([piece for _ in range(30) for piece in (b": ping\n\n", 0.05)])
    with serving(script) as url:
        slow = settings(warmup=0, timeouts=Timeouts(connect_s=0.3, stall_s=0.3, total_s=0.4))
        [record] = measured(url, requests=1, settings=slow).records
    assert (record.outcome, record.detail) == ("timeout", "not done in 0.4 s")
    assert {event.kind for event in record.events} == {"comment"}


def test_the_key_is_sent_and_is_nowhere_else(tmp_path, monkeypatch, capsys):
    key = "loopback-0123456789"  # of no form by which it would be refused at once
    monkeypatch.setenv("LOOPBACK_KEY", key)
    script = Script([sse(chunk({"content": "you sent " + key})), sse({"error": {"message": f"bad key {key}"}})])
    refusal = Script([json.dumps({"error": {"message": f"Incorrect API key: {key}"}}).encode()], status=401)
    for name, protocol, one in (("a", "openai-chat", script), ("b", "modelslab", script), ("c", "anthropic", refusal)):
        with serving(one) as url:
            hidden = {"user": {"id": [key]}}
            endpoint = Endpoint(url, model="m", key_env="LOOPBACK_KEY", protocol=protocol, extra=hidden)
            bench = measured(url, endpoint=endpoint, out=tmp_path / name)
        headers, body = one.requests[-1]
        assert (body.get("key") if protocol == "modelslab" else headers.get("Authorization", "")).endswith(key)
        assert body["user"] == hidden["user"]
        print(bench, bench._repr_html_(), endpoint, bench.requests().to_string(), bench.meta)
        assert "[key]" in bench.records[0].detail + bench.records[0].text
    written = b"".join(path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file())
    assert key.encode() not in written
    assert b"LOOPBACK_KEY" in written
    assert key not in "".join(capsys.readouterr())


def test_no_part_of_the_key_is_left_where_a_refusal_is_shortened(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    with serving(Script([b"." * 490 + KEY.encode()], status=401)) as url:
        bench = measured(url, endpoint=Endpoint(url, model="m", key_env="LOOPBACK_KEY"))
    assert bench.records[0].detail == "." * 490 + "[key]"


def test_caps_on_seconds_and_dollars_stop_what_has_not_begun():
    script = Script(answer(wait=0.02))
    with serving(script) as url:
        timed = measured(url, requests=500, settings=settings(max_seconds=0.4))
        assert 1 <= len(timed.records) < 100
        assert timed.meta["stopped"] == "the cap of 0.4 seconds"
        script.requests.clear()
        # 20 tokens in at $1 and 6 out at $10 a million make 80 millionths; the worst case is set aside first.
        paid = measured(url, requests=500, settings=settings(max_dollars=0.001, price=(1.0, 10.0)))
    spent = len(script.requests) * 80e-6
    assert 0.0004 < spent <= 0.001
    assert paid.meta["stopped"] == "the cap of $0.001"
    assert "Stopped early by the cap" in repr(paid)


def test_a_cap_that_was_met_is_met_for_good():
    # A cheap request would still fit after a dear one did not: the load would go on with fewer at a time.
    caps = Caps(dollars=0.001, price=(1.0, 10.0))
    assert caps.admit(Job(0, "l", "measured", "x", 50), 0.0) == pytest.approx(565e-6)
    assert caps.admit(Job(1, "l", "measured", "x", 50), 0.0) is None
    assert caps.admit(Job(2, "l", "measured", "x", 1), 0.0) is None
    assert caps.spent_usd == pytest.approx(565e-6)


def test_a_cap_in_dollars_needs_a_price():
    with refused(BadInput, "max_dollars", 1.0):
        measured("http://127.0.0.1:9/v1", settings=settings(max_dollars=1.0))


def test_a_running_loop_as_in_a_notebook_is_no_hindrance():
    async def notebook(url: str) -> Bench:
        return measured(url)

    with serving(Script(answer())) as url:
        assert asyncio.run(notebook(url)).succeeded == 2


def test_a_killed_run_keeps_its_requests_until_it_is_measured_again(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise SystemExit

    with serving(Script(answer())) as url:
        with monkeypatch.context() as patched:
            patched.setattr("mixlens.bench.session.ordered", killed)
            with pytest.raises(SystemExit):
                measured(url, out=tmp_path / "run")
        assert len(list(read_records(tmp_path / "run" / PARTIAL))) == 3
        with pytest.warns(UserWarning, match="3 requests"):
            again = measured(url, out=tmp_path / "run")
    assert again.succeeded == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["meta.json", "plan.json", "results.jsonl"]


def test_an_interrupt_leaves_a_run_that_opens(tmp_path, monkeypatch):
    def interrupted(drive, stop):
        asyncio.run(drive())
        return False

    monkeypatch.setattr("mixlens.bench.session._run", interrupted)
    with serving(Script(answer())) as url, pytest.raises(KeyboardInterrupt):
        measured(url, out=tmp_path / "run")
    assert "Stopped early by an interrupt" in repr(mixlens.open(tmp_path / "run"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": (2, 2)}, "concurrency"),
        ({"concurrency": ()}, "concurrency"),
        ({"rate": -1.0}, "rate"),
        ({"rate": 1.0, "settings": settings(arrivals="uniform")}, "arrivals"),
        ({"requests": 0}, "requests"),
    ],
)
def test_loads_that_cannot_be(fields, named):
    with refused(BadInput, named):
        measured("http://127.0.0.1:9/v1", **fields)


def test_prompts_have_their_length_and_are_the_caller_s_where_given():
    counted = Workload(prompt_tokens=100, count_tokens=lambda text: 2 * len(text.split()))
    assert 97 <= 2 * len(counted.prompt(3).split()) <= 100
    assert len(Workload(prompt_tokens=50).prompt(0).split()) == 50
    own = Workload(prompts=["a", "b"])
    assert [own.prompt(i) for i in range(3)] == ["a", "b", "a"]
    assert own.plan()["distinct"] == 2
    for wrong in ({"prompt_tokens": 3}, {"output_tokens": 0}, {"prompts": []}, {"prompts": ["a", ""]}):
        with refused(BadInput, *wrong):
            Workload(**wrong)
