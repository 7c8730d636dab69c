"""What was parsed, cross-checked: the openai and anthropic SDKs read the same answers from the same server."""

from __future__ import annotations

import anthropic
import openai
import pytest
from bench_scripts import SCRIPTS, TOKENS
from bench_server import Script, serving

from mixlens.bench.prompts import Workload
from mixlens.bench.run import benchmark
from mixlens.bench.session import BenchSettings
from mixlens.endpoints.endpoint import Endpoint

ASKED = {"model": "m", "max_tokens": 64}
MESSAGES = [{"role": "user", "content": "Hi"}]


def served(protocol: str) -> Script:
    return Script([piece for _, piece in SCRIPTS[protocol]()])


def measured(url: str, protocol: str):
    settings = BenchSettings(warmup=0, progress=False, max_seconds=20.0)
    endpoint = Endpoint(url, model="m", protocol=protocol)
    return benchmark(endpoint, requests=1, workload=Workload(prompts=["Hi"]), settings=settings)


@pytest.mark.parametrize("protocol", ["openai-chat", "openai-completions"])
def test_the_openai_sdk_reads_the_same(protocol):
    with serving(served(protocol)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        made = measured(url, protocol)
        with client:
            if protocol == "openai-chat":
                chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **ASKED))
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            else:
                chunks = list(client.completions.create(prompt="Hi", stream=True, **ASKED))
                text = "".join(c.choices[0].text for c in chunks if c.choices)
    usage = next(c.usage for c in reversed(chunks) if c.usage)
    [record] = made.records
    assert record.text == text
    row = made.requests().iloc[0]
    assert (row["output_tokens"], row["input_tokens"]) == (usage.completion_tokens, usage.prompt_tokens) == (TOKENS, 11)


def test_the_anthropic_sdk_reads_the_same():
    with serving(served("anthropic")) as url:
        made = measured(url, "anthropic")
        client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
        with client, client.messages.stream(messages=MESSAGES, **ASKED) as stream:
            text = "".join(stream.text_stream)
            whole = stream.get_final_message()
    assert made.records[0].text == text
    row = made.requests().iloc[0]
    assert row["output_tokens"] == whole.usage.output_tokens == TOKENS
    assert row["input_tokens"] == whole.usage.input_tokens
    assert made.records[0].outcome == "ok"
    assert whole.stop_reason == next(e.finish for e in made.records[0].events if e.finish)
