"""A real server: `transformers serve` with the demo model, measured, probed and read by the openai SDK."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from mixlens.bench.prompts import Workload
from mixlens.bench.run import benchmark
from mixlens.bench.session import BenchSettings
from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.probe import probe
from mixlens.endpoints.protocols import ROLE, TOKEN
from mixlens.models.demo import demo_path

pytestmark = pytest.mark.slow
MODEL = str(demo_path())


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf")
    (home / "hub").mkdir()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", MODEL, "--host", "127.0.0.1"]
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    server = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"],
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield ready(f"http://127.0.0.1:{port}/v1", server)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def ready(url: str, server: subprocess.Popen) -> str:
    for _ in range(360):
        try:
            httpx.get(url + "/models", timeout=2, trust_env=False)
            return url
        except httpx.TransportError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"transformers serve ended with {server.wait(0.5)}") from None
    raise AssertionError("transformers serve did not start")


def test_time_to_first_token_is_not_that_of_the_role_chunk(url):
    settings = BenchSettings(progress=False, max_seconds=240.0)
    made = benchmark(
        Endpoint(url, model=MODEL, extra={"temperature": 0}),
        concurrency=2,
        requests=4,
        workload=Workload(prompt_tokens=32, output_tokens=12),
        settings=settings,
    )
    assert made.succeeded == 4
    rows = made.requests().query("phase == 'measured'")
    assert (rows["token_source"] == "usage").all()
    assert (rows["output_tokens"] <= 12).all()
    for record, row in zip([r for r in made.records if r.phase == "measured"], rows.itertuples(), strict=True):
        first = {kind: min(e.at_s for e in record.events if e.kind == kind) for kind in (ROLE, TOKEN)}
        assert first[ROLE] < first[TOKEN]
        assert row.ttft_s == pytest.approx(first[TOKEN] - record.sent_s)


def test_the_sdk_reads_the_same_answer(url):
    endpoint = Endpoint(url, model=MODEL, extra={"temperature": 0})
    settings = BenchSettings(warmup=0, progress=False, max_seconds=240.0)
    work = Workload(prompts=["The river rose in the night."], output_tokens=12)
    [record] = benchmark(endpoint, requests=1, workload=work, settings=settings).records
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asked = {"messages": [{"role": "user", "content": work.prompt(0)}], "max_tokens": 12, "temperature": 0}
        chunks = list(client.chat.completions.create(model=MODEL, stream=True, **asked))
    assert record.text == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert endpoint.complete(work.prompt(0), max_tokens=12).text == record.text


def test_what_this_server_accepts_without_effect_is_found_out(url):
    names = ["response_format", "presence_penalty", "max_completion_tokens", "stream"]
    found = probe(Endpoint(url, model=MODEL), parameters=names, max_tokens=12)
    assert found.verdicts == {
        "response_format": "ignored",
        "presence_penalty": "ignored",
        "max_completion_tokens": "honoured",
        "stream": "honoured",
    }


def test_a_field_that_it_does_not_know_is_a_refusal(url):
    settings = BenchSettings(warmup=0, progress=False, max_seconds=60.0)
    made = benchmark(Endpoint(url, model=MODEL, extra={"logit_lens": 1}), requests=1, settings=settings)
    assert [(record.outcome, record.status) for record in made.records] == [("http", 422)]
