"""Forms in which servers and gateways answer: each is read as it was meant, or an outcome or a remark says otherwise.

The pieces of a stream arrive at 1, 2, 3 ... s.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from bench_scripts import chunk, replay, sse

from mixlens.bench.events import Record, StreamReader, outcome_of
from mixlens.bench.metrics import request_table
from mixlens.bench.shares import shares
from mixlens.endpoints.protocols import without_thinking
from mixlens.endpoints.waits import asked_wait

THREE = ["One", " two", " three"]
USED = {"prompt_tokens": 11, "completion_tokens": 3}


def content(*texts: str) -> list[bytes]:
    return [sse(chunk({"content": text})) for text in texts]


def end(finish: str | None = "stop", usage: Any = None, **more: Any) -> list[bytes]:
    tail = [sse({"choices": [], "usage": usage})] if usage else []
    return [sse(chunk({}, finish, **more)), *tail, sse("[DONE]")]


def answered(*deltas: dict[str, Any], finish: str = "stop", usage: Any = None) -> list[bytes]:
    return [*(sse(chunk(delta)) for delta in deltas), *end(finish, usage)]


def message(content: Any, usage: Any = None, finish: str = "stop", **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def anthropic(*deltas: dict[str, Any], usage: dict[str, Any], stop: str | None = "end_turn") -> list[bytes]:
    start = {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 11, "output_tokens": 1}}}
    blocks = [sse({"type": "content_block_delta", "index": 0, "delta": delta}) for delta in deltas]
    last = {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": usage}
    return [sse(start), *blocks, sse(last), sse({"type": "message_stop"})]


def read(pieces: list[bytes] | bytes, protocol: str = "openai-chat") -> Record:
    script = [(float(at), piece) for at, piece in enumerate([pieces] if isinstance(pieces, bytes) else pieces, 1)]
    return replay(script, protocol)


def row(record: Record) -> dict[str, Any]:
    return request_table([record]).iloc[0].to_dict()


TEXT_DELTAS = [{"type": "text_delta", "text": text} for text in THREE]

# {name: (pieces, protocol, what is true of the row)}; "text", "reasoning", "finish" and "outcome" are of the record.
TRUE: dict[str, tuple[Any, str, dict[str, Any]]] = {
    # usage, wherever it is
    "usage in a choice": (
        [*content(*THREE), sse({"choices": [{"delta": {}, "finish_reason": "stop", "usage": USED}]})],
        "openai-chat",
        {"output_tokens": 3, "input_tokens": 11, "token_source": "usage", "tpot_s": 1.0},
    ),
    "usage of Groq": (
        [*content(*THREE), sse(chunk({}, "stop", x_groq={"usage": USED})), sse("[DONE]")],
        "openai-chat",
        {"output_tokens": 3, "token_source": "usage"},
    ),
    "timings of llama.cpp": (
        [*content(*THREE), sse(chunk({}, "stop", timings={"prompt_n": 4, "cache_n": 7, "predicted_n": 3}))],
        "openai-chat",
        {"output_tokens": 3, "input_tokens": 11, "cached_tokens": 7},
    ),
    "timings of llama.cpp beside the usage": (
        [*content(*THREE), sse(chunk({}, "stop", usage=USED, timings={"prompt_n": 4, "predicted_n": 3}))],
        "openai-chat",
        {"output_tokens": 3, "input_tokens": 11, "cached_tokens": 7},
    ),
    "several tokens an event": (
        [*content("word " * 9, "word " * 9), *end(usage=USED | {"completion_tokens": 18})],
        "openai-chat",
        {"output_tokens": 18, "tpot_s": 1 / 9},
    ),
    "more tokens than bytes, of which nothing is said": (
        [*content(*THREE), *end(usage=USED | {"completion_tokens": 403})],
        "openai-chat",
        {"output_tokens": 403, "tpot_s": 1.0},
    ),
    "a summary of the thinking of Anthropic": (
        anthropic(
            {"type": "thinking_delta", "thinking": "Hm"},
            *TEXT_DELTAS,
            usage={"output_tokens": 40, "output_tokens_details": {"thinking_tokens": 37}},
        ),
        "anthropic",
        {"output_tokens": 40, "reasoning_tokens": 37, "tpot_s": 1.0},
    ),
    # texts twice
    "the text so far beside every delta": (
        [sse({"choices": [{"delta": {"content": t}, "message": {"content": "One two"}}]}) for t in THREE]
        + [sse({"choices": [{"delta": {}, "message": {"content": "One two three"}, "finish_reason": "stop"}]})],
        "openai-chat",
        {"text": "One two three", "tpot_s": 1.0},
    ),
    **{
        f"the whole text at the end, as {name}": (
            [*content(*THREE), sse({"choices": [{name: {"content": "One two three"}, "finish_reason": "stop"}]})],
            "openai-chat",
            {"text": "One two three", "tpot_s": 1.0, "output_tokens": 3, "outcome": "ok"},
        )
        for name in ("delta", "message")
    },
    # signs of life
    **{
        f"a sign of life: {name}": (
            [*content(*THREE), sign, *end(usage=USED)],
            "openai-chat",
            {"outcome": "ok", "text": "One two three", "tpot_s": 1.0},
        )
        for name, sign in {
            "a name": b"event: heartbeat\ndata: {}\n\n",
            "a name and words": b"event: keep-alive\ndata: alive\n\n",
            "a type": sse({"type": "heartbeat", "at": 1}),
            "nothing": sse({}),
            "null": b"data: null\n\n",
            "a choice of null": sse({"choices": [None]}),
            "no error": sse({"choices": [], "error": {"code": 0, "message": ""}}),
        }.items()
    },
    "usage as floats": (
        [*content(*THREE), *end(usage={"prompt_tokens": 11.0, "completion_tokens": 3.0})],
        "openai-chat",
        {"output_tokens": 3, "input_tokens": 11},
    ),
    "usage as words": (
        [*content(*THREE), *end(usage={"prompt_tokens": "11", "completion_tokens": "3"})],
        "openai-chat",
        {"output_tokens": 3, "input_tokens": math.nan, "token_source": "chunks"},
    ),
    "usage of zeros": (
        [*content(*THREE), *end(usage={"prompt_tokens": 0, "completion_tokens": 0})],
        "openai-chat",
        {"output_tokens": 3, "token_source": "chunks"},
    ),
    "usage below zero": (
        [*content(*THREE), *end(usage={"prompt_tokens": -1, "completion_tokens": -1})],
        "openai-chat",
        {"output_tokens": 3, "token_source": "chunks"},
    ),
    "usage twice, then whole": (
        [*content(*THREE), sse({"choices": [], "usage": {"completion_tokens": 2}}), *end(usage=USED)],
        "openai-chat",
        {"output_tokens": 3},
    ),
    "usage on every chunk": (
        [sse(chunk({"content": t}, usage={"completion_tokens": 2 * n})) for n, t in enumerate(THREE, 1)] + end(),
        "openai-chat",
        {"output_tokens": 6, "tpot_s": 0.5},
    ),
    "usage of a list": ([*content(*THREE), *end(usage=[3])], "openai-chat", {"output_tokens": 3, "outcome": "ok"}),
    "reasoning beside the completion, as at xAI": (
        [
            *content(*THREE),
            *end(usage=USED | {"total_tokens": 114, "completion_tokens_details": {"reasoning_tokens": 100}}),
        ],
        "openai-chat",
        {"output_tokens": 103, "reasoning_tokens": 100, "tpot_s": 1.0},
    ),
    "reasoning within the completion": (
        [
            *content(*THREE),
            *end(usage={"completion_tokens": 103, "completion_tokens_details": {"reasoning_tokens": 100}}),
        ],
        "openai-chat",
        {"output_tokens": 103, "reasoning_tokens": 100, "tpot_s": 1.0},
    ),
    # what was cached
    **{
        f"cached, as {name}": (
            [*content(*THREE), *end(usage=USED | usage)],
            "openai-chat",
            {"cached_tokens": 8},
        )
        for name, usage in {
            "OpenAI": {"prompt_tokens_details": {"cached_tokens": 8}},
            "DeepSeek": {"prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 3},
            "Moonshot": {"cached_tokens": 8},
            "SGLang": {"prompt_tokens_details": None, "num_cached_tokens": 8},
            "a gateway before Anthropic": {"cache_read_input_tokens": 8},
            "the Responses API": {"input_tokens_details": {"cached_tokens": 8}},
        }.items()
    },
    "cached, as Anthropic": (
        anthropic(
            *TEXT_DELTAS,
            usage={
                "input_tokens": 3,
                "cache_read_input_tokens": 8,
                "cache_creation_input_tokens": 0,
                "output_tokens": 3,
            },
        ),
        "anthropic",
        {"cached_tokens": 8, "input_tokens": 11, "output_tokens": 3},
    ),
    # reasoning
    **{
        f"reasoning between {opening}": (
            [*content(opening, "Hm", closing, "One", " two"), *end()],
            "openai-chat",
            {"text": "One two", "reasoning": f"{opening}Hm{closing}", "ttft_s": 1.0, "ttft_answer_s": 4.0},
        )
        for opening, closing in (
            ("<think>", "</think>"),
            ("<thinking>", "</thinking>"),
            ("<thought>", "</thought>"),
            ("<seed:think>", "</seed:think>"),
            ("[THINK]", "[/THINK]"),
            ("◁think▷", "◁/think▷"),
            ("<|START_THINKING|>", "<|END_THINKING|>"),
            ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            ("analysis", "assistantfinal"),
            ("<|begin_of_thought|>", "<|end_of_thought|>"),
            ("<|channel>thought", "<channel|>"),
        )
    },
    "reasoning whose first tag is in the prompt": (
        [*content("Hm", "</think>", "One"), *end()],
        "openai-chat",
        {"text": "One", "ttft_answer_s": 3.0},
    ),
    "reasoning twice": (
        [*content("<think>", "a</think>", "<think>b", "</think>", "One"), *end()],
        "openai-chat",
        {"text": "One", "reasoning": "<think>a</think><think>b</think>"},
    ),
    "reasoning that never ends": (
        [*content("<think>", "Hm"), *end("length")],
        "openai-chat",
        {"text": "", "reasoning": "<think>Hm"},
    ),
    "reasoning as summaries": (
        answered(
            {"reasoning_details": [{"type": "reasoning.summary", "summary": "Hm"}]},
            {"reasoning_details": [{"type": "reasoning.encrypted", "data": "xx"}]},
            {"content": "One"},
        ),
        "openai-chat",
        {"text": "One", "reasoning": "Hm"},
    ),
    **{
        f"reasoning as {delta}": (
            answered({**delta, "content": ""}, {"content": "One"}),
            "openai-chat",
            {"text": "One", "reasoning": "Hm", "ttft_s": 1.0, "ttft_answer_s": 2.0},
        )
        for delta in (
            {"thinking": "Hm"},
            {"reasoning_text": "Hm"},
            {"reasoning": {"content": "Hm"}},
            {"reasoning_content": [{"type": "text", "text": "Hm"}]},
            {"reasoning_content": "Hm", "thinking_blocks": [{"type": "thinking", "thinking": "Hm"}]},
        )
    },
    "reasoning signed and redacted": (
        [
            sse({"type": "content_block_start", "content_block": {"type": "redacted_thinking", "data": "xx"}}),
            *anthropic(
                {"type": "thinking_delta", "thinking": "Hm"},
                {"type": "signature_delta", "signature": "xx"},
                *TEXT_DELTAS,
                usage={"output_tokens": 4},
            ),
        ],
        "anthropic",
        {"text": "One two three", "reasoning": "Hm", "outcome": "ok"},
    ),
    # what is in the answer, and how it ends
    "a call of a tool": (
        answered(
            {"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]},
            finish="tool_calls",
        ),
        "openai-chat",
        {"text": 'look{"a":1}', "outcome": "ok"},
    ),
    "a call of a function": (
        answered({"function_call": {"name": "look", "arguments": "{}"}}, finish="function_call"),
        "openai-chat",
        {"text": "look{}", "outcome": "ok"},
    ),
    "a refusal that says stop": (
        answered({"refusal": "I "}, {"refusal": "can't."}),
        "openai-chat",
        {"text": "I can't.", "finish": "refusal"},
    ),
    "an end called null": ([*content(*THREE), sse(chunk({}, "null"))], "openai-chat", {"outcome": "truncated"}),
    "an end called eos": ([*content(*THREE), sse(chunk({}, "eos"))], "openai-chat", {"outcome": "ok", "finish": "eos"}),
    "an end within the last event": (
        [*content("One"), sse(chunk({"content": " two"}, "stop"))],
        "openai-chat",
        {"text": "One two", "outcome": "ok"},
    ),
    "an end in quotes": ([*content(*THREE), sse('"[DONE]"')], "openai-chat", {"outcome": "ok"}),
    "no end": (content(*THREE), "openai-chat", {"outcome": "truncated"}),
    "a role alone": (answered({"role": "assistant"}), "openai-chat", {"outcome": "empty"}),
    "filters before and after, as Azure": (
        [
            sse({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}),
            *content(*THREE),
            sse({"choices": [{"index": 0, "finish_reason": None, "content_filter_results": {}, "delta": {}}]}),
            *end(),
        ],
        "openai-chat",
        {"outcome": "ok", "text": "One two three", "ttft_s": 2.0},
    ),
    "several answers": (
        [*content("One"), sse({"choices": [{"index": 1, "delta": {"content": "Uno"}}]}), *end()],
        "openai-chat",
        {"outcome": "malformed"},
    ),
    # faults within a good status
    **{
        f"a fault within a good status: {name}": (
            [*content("One"), sse(fault), sse("[DONE]")],
            "openai-chat",
            {"outcome": "error"},
        )
        for name, fault in {
            "an error": {"error": {"message": "overloaded", "code": 529}},
            "a text": {"error": "overloaded"},
            "vLLM's old form": {"object": "error", "message": "overloaded", "code": 500},
            "a message alone": {"message": "overloaded"},
            "a detail": {"detail": "overloaded"},
            "in a choice": {"choices": [{"delta": {}, "error": {"message": "gone", "code": 502}}]},
            "a reason": chunk({}, "error"),
            "an abort": chunk({}, "abort"),
            "no resources": chunk({}, "insufficient_system_resource"),
            "a reason in capitals": chunk({}, "TIMEOUT"),
            "a code and words": {"code": "1302", "msg": "too many requests"},
            "MiniMax's form": {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "slow down"}},
        }.items()
    },
    # the wire
    "NDJSON in place of events": (
        [json.dumps(chunk({"content": text})).encode() + b"\n" for text in THREE],
        "openai-chat",
        {"outcome": "malformed", "form": "json"},
    ),
    "a whole answer in place of events": (
        [message("One two three", USED)],
        "openai-chat",
        {"outcome": "ok", "form": "json", "text": "One two three", "output_tokens": 3, "ttft_s": math.nan},
    ),
    "a whole answer behind blanks": (
        [b"\xef\xbb", b"\xbf\n \n", message("One two three", USED)[:20], message("One two three", USED)[20:]],
        "openai-chat",
        {"outcome": "ok", "form": "json", "e2e_token_s": 4.0},
    ),
    "a page": ([b"<html><body>Bad gateway</body></html>"], "openai-chat", {"outcome": "malformed", "form": "json"}),
    "a whole fault": ([b'{"error": {"message": "no"}}'], "openai-chat", {"outcome": "error"}),
    "carriage returns alone": (
        [piece.replace(b"\n", b"\r") for piece in [*content(*THREE), *end()]],
        "openai-chat",
        {"outcome": "ok", "text": "One two three", "tpot_s": 1.0},
    ),
    "events divided by one line end": (
        [piece.removesuffix(b"\n") for piece in content("One")] + [b"\n"] + end(),
        "openai-chat",
        {"outcome": "ok", "text": "One"},
    ),
    "one event in several lines": (
        [b'data: {"choices": [\ndata: {"delta": {"content": "One"}}\ndata: ]}\n\n', *end()],
        "openai-chat",
        {"outcome": "ok", "text": "One"},
    ),
    "ids, retries, names and comments": (
        [b": hi\n\nid: 1\nretry: 5\nevent: completion\n" + content("One")[0], b":\n\n", b"event: x\n\n", *end()],
        "openai-chat",
        {"outcome": "ok", "text": "One"},
    ),
    "no blank behind data": (
        [piece.replace(b"data: ", b"data:") for piece in [*content(*THREE), *end()]],
        "openai-chat",
        {"outcome": "ok", "text": "One two three"},
    ),
}


@pytest.mark.parametrize("name", TRUE)
def test_an_answer_is_read_as_it_was_meant(name):
    pieces, protocol, expected = TRUE[name]
    record = read(pieces, protocol)
    reader = StreamReader(protocol)
    for at, piece in enumerate(pieces, 1):
        for byte in piece:
            reader.feed(bytes([byte]), float(at))
    reader.close(float(len(pieces)))
    assert tuple(reader.events) == record.events
    record = replace(record, form=reader.form, outcome=outcome_of(reader.events, status=200))
    found = row(record) | {"text": record.text, "reasoning": record.reasoning, "outcome": record.outcome}
    for column, value in expected.items():
        given = found[column]
        assert given == value or (isinstance(value, float) and given == pytest.approx(value, nan_ok=True)), column


# {name: (pieces, a word of the remark)}
REMARKED = {
    "a limit by another name": ([*content(*THREE), *end("MAX_TOKENS")], "length limit"),
    "a limit of a program": ([*content(*THREE), *end("FinishReason.MAX_TOKENS")], "length limit"),
    "a limit in an object": ([*content(*THREE), *end({"type": "length", "length": 3})], "length limit"),
    "a reason of its own": ([*content(*THREE), *end("repetition")], "repetition"),
    "a turn that goes on": ([*content(*THREE), *end("pause_turn")], "pause_turn"),
    "several tokens an event": (
        [*content("word " * 9, "word " * 9), *end(usage=USED | {"completion_tokens": 18})],
        "several tokens per event",
    ),
    "more tokens than bytes": ([*content(*THREE), *end(usage=USED | {"completion_tokens": 403})], "more tokens than"),
    "a context that was full": ([*content(*THREE), *end("model_context_window_exceeded")], "length limit"),
    "a filter": ([*content(*THREE), *end("content_filter")], "filter"),
    "a guardrail": ([*content(*THREE), *end("guardrail_intervened")], "filter"),
    "a refusal": (answered({"refusal": "No."}), "refused"),
    "reasoning alone": (answered({"reasoning": "Hm"}, finish="length"), "without an answer"),
    "hidden reasoning": (
        [*content(*THREE), *end(usage=USED | {"completion_tokens": 9, "reasoning_tokens": 6})],
        "hidden reasoning",
    ),
    "a tool": (answered({"tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}, finish="tool_calls"), "tool"),
    "another model": ([*content(*THREE), *end(model="smaller")], "a model other than"),
    "a prefix cache": ([*content(*THREE), *end(usage=USED | {"cached_tokens": 8})], "prefix cache"),
    "fewer tokens than events": ([*content(*THREE), *end(usage={"completion_tokens": 1})], "fewer tokens"),
    "all of the text each time": ([*content("a", "ab", "abc", "abcd", "abcde"), *end()], "repeats"),
}


@pytest.mark.parametrize("name", REMARKED)
def test_what_a_number_alone_would_hide_is_remarked_on(name):
    pieces, word = REMARKED[name]
    record = read(pieces)
    assert record.outcome == "ok"
    assert any(word in remark for remark in shares([record], "m")), shares([record], "m")
    assert not shares([read([*content(*THREE), *end(usage=USED, model="m@main")])], "m")


@pytest.mark.parametrize("text", ["a < b", "I think </b>", "<thinker>", "So <think> is a tag.", ""])
def test_an_answer_without_reasoning_keeps_its_text(text):
    assert without_thinking(text) == (text, "")


def test_many_tags_take_no_time():
    for text in ("<think></think>" * 50_000, "<think>" * 100_000, "</thought>" + "[THINK]" * 100_000):
        without_thinking(text)


NEVER = {"retry-after": "soon"}
PAST = "Sun, 06 Nov 1994 08:49:37 GMT"
WAITS = [
    ({"Retry-After": "7"}, b"", 7.0),
    ({"retry-after": "0"}, b"", 0.0),
    ({"Retry-After": PAST}, b"", 0.0),
    ({"Retry-After": "-3"}, b"", 0.0),
    ({"retry-after-ms": "1500", "retry-after": "2"}, b"", 1.5),
    ({"x-ms-retry-after-ms": "250"}, b"", 0.25),
    ({"x-ratelimit-reset-requests": "6m0.5s"}, b"", 360.5),
    ({"x-ratelimit-reset-tokens": "20ms"}, b"", 0.02),
    ({"X-RateLimit-Reset": "30"}, b"", 30.0),
    ({"ratelimit-reset": "1h2m3s"}, b"", 3723.0),
    ({"RateLimit": "limit=10, remaining=0, reset=9"}, b"", 9.0),
    ({"RateLimit": '"default";r=0;t=12'}, b"", 12.0),
    ({"anthropic-ratelimit-requests-reset": "1994-11-06T08:49:37Z"}, b"", 0.0),
    ({}, b'{"error": {"metadata": {"headers": {"X-RateLimit-Reset": "5"}}}}', 5.0),
    ({}, b'{"error": {"message": "Rate limit reached. Please try again in 7.66s."}}', 7.66),
    ({}, b'{"error": {"message": "Please retry after 6 seconds."}}', 6.0),
    ({}, b'{"error": {"details": [{"retryDelay": "13s"}]}}', 13.0),
    ({}, b'{"error": "Model m is currently loading", "estimated_time": 20.5}', 20.5),
    ({}, b'{"message": "slow down", "retry_after": "9"}', 9.0),
    ({}, b'{"error": {"message": "Too many requests. Please wait 12 seconds."}}', 12.0),
    ({}, b'{"error": {"message": "Limit resets in 1m5s"}}', 65.0),
    ({"x-ratelimit-timeremaining": "40"}, b"", 40.0),
    (NEVER, b"", None),
    ({"retry-after": ""}, b"", None),
    ({"retry-after": "nan"}, b"not json", None),
    ({}, b'{"error": ["try again in a moment"]}', None),
]


@pytest.mark.parametrize(("headers", "body", "seconds"), WAITS)
def test_the_wait_that_a_server_asks_for_is_found(headers, body, seconds):
    assert asked_wait(headers, body) == (None if seconds is None else pytest.approx(seconds))
