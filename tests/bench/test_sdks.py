"""What was parsed, cross-checked: the openai and anthropic SDKs read the same answers from the same server."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import anthropic
import fuzz_streams
import httpx
import httpx2  # the anthropic SDK's
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


def client_of(library: ModuleType, server: fuzz_streams.Server) -> Any:
    """A client of httpx, or of httpx2, that is answered with a drawn stream."""
    body = b"".join(data for data, _ in server.events)
    stream = library.Response(200, headers={"Content-Type": "text/event-stream"}, content=body)
    return library.Client(transport=library.MockTransport(lambda _: stream))


def by_openai(server: fuzz_streams.Server) -> tuple[str, str]:
    """(text, reason for the end) as the openai SDK reads a stream; raises what it raises."""
    client = openai.OpenAI(base_url="http://sdk.invalid/v1", api_key="-", http_client=client_of(httpx, server))
    ask = client.completions if server.protocol == "openai-completions" else client.chat.completions
    asked = {"prompt": "Hi"} if server.protocol == "openai-completions" else {"messages": MESSAGES}
    text, finish = "", None
    for chunk in ask.create(model="m", stream=True, **asked):
        for choice in chunk.choices or []:
            content = choice.text if server.protocol == "openai-completions" else choice.delta.content
            parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
            text += "".join(part["text"] for part in parts if part["type"] == "text")
            if server.protocol != "openai-completions":
                text += "".join(call.function.arguments or "" for call in choice.delta.tool_calls or [])
            finish = choice.finish_reason or finish
    return text, finish


def by_anthropic(server: fuzz_streams.Server) -> tuple[str, str]:
    client = anthropic.Anthropic(base_url="http://sdk.invalid", api_key="-", http_client=client_of(httpx2, server))
    text, finish = "", None
    for event in client.messages.create(model="m", max_tokens=8, messages=MESSAGES, stream=True):
        if event.type == "content_block_delta" and event.delta.type == "text_delta":
            text += event.delta.text
        elif event.type == "message_delta":
            finish = event.delta.stop_reason or finish
    return text, finish


READERS = {"openai-chat": by_openai, "openai-completions": by_openai, "anthropic": by_anthropic}
REFUSED = (openai.OpenAIError, anthropic.AnthropicError, ValueError, TypeError, AttributeError, KeyError)


def differs(seed: int) -> str | None:
    """What the SDK reads and we do not; None where it agrees, "refused" where the SDK cannot read the stream."""
    server = fuzz_streams.Server(seed)
    if server.protocol not in READERS or server.truth.outcome == "malformed":
        return None
    try:
        text, finish = READERS[server.protocol](server)
    except REFUSED:
        return "refused"
    record = fuzz_streams.read(server)
    if not text and not finish:
        return "refused"  # events without a name, in the anthropic SDK
    if record.outcome == "error" or (record.outcome == "truncated" and not finish):
        return None if record.outcome == server.truth.outcome else record.outcome  # which the SDK does not notice
    tagged = any(text.startswith(opening) for opening, _ in fuzz_streams.TAGS)
    answered = record.reasoning + record.text if tagged else record.text
    return None if (record.outcome, answered, record.finish) == ("ok", text, finish) else f"{record.outcome} {finish}"


def test_what_the_sdks_read_of_a_drawn_stream_is_read_the_same():
    found = {seed: differs(seed) for seed in range(200)}
    assert not {seed: what for seed, what in found.items() if what not in (None, "refused")}
    assert sum(what is None for what in found.values()) > 100
