"""A scripted answer whose truth is known, in every protocol, and its replay by an injected clock."""

from __future__ import annotations

import json
from itertools import pairwise

from mixlens.bench.events import Record, StreamReader, outcome_of

TEXTS = ["Every", " token", " is", " sent", " to", " two", " of", " eight", " ex", "perts"]
# Content at 400, 500, ... 1300 ms.
CONTENT_S = [0.4 + 0.1 * i for i in range(10)]
TOKENS = 29


def sse(data: object, event: str = "", end: str = "\n") -> bytes:
    head = f"event: {event}{end}" if event else ""
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}{end}{end}".encode()


def chunk(delta: dict, finish: str | None = None, **more: object) -> dict:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **more,
    }


def openai_chat() -> list[tuple[float, bytes]]:
    usage = {"prompt_tokens": 11, "completion_tokens": TOKENS, "total_tokens": 11 + TOKENS}
    return [
        (0.0, b": OPENROUTER PROCESSING\n\n"),
        (0.05, sse(chunk({"role": "assistant", "content": ""}, provider="DeepInfra"))),
        *((at, sse(chunk({"content": text}))) for at, text in zip(CONTENT_S, TEXTS, strict=True)),
        (1.3, sse(chunk({}, "stop"))),
        (1.5, sse({"choices": [], "usage": usage})),
        (1.5, sse("[DONE]")),
    ]


def openai_completions() -> list[tuple[float, bytes]]:
    script = [(0.0, b": waiting\n\n"), (0.05, sse({"choices": [{"text": "", "finish_reason": None}]}))]
    script += [(at, sse({"choices": [{"text": text}]})) for at, text in zip(CONTENT_S, TEXTS, strict=True)]
    end = {
        "choices": [{"text": "", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": TOKENS},
    }
    return [*script, (1.5, sse(end))]


def anthropic() -> list[tuple[float, bytes]]:
    start = {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 11, "output_tokens": 1},
        },
    }
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": TOKENS}}

    def delta(text: str) -> dict:
        return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}

    return [
        (0.0, sse({"type": "ping"}, "ping")),
        (0.05, sse(start, "message_start") + sse(block, "content_block_start")),
        *((at, sse(delta(text), "content_block_delta")) for at, text in zip(CONTENT_S, TEXTS, strict=True)),
        (1.3, sse({"type": "content_block_stop", "index": 0}, "content_block_stop")),
        (1.5, sse(end, "message_delta")),
        (1.5, sse({"type": "message_stop"}, "message_stop")),
    ]


SCRIPTS = {"openai-chat": openai_chat, "openai-completions": openai_completions, "anthropic": anthropic}


def replay(
    script: list[tuple[float, bytes]], protocol: str = "openai-chat", *, size: int | None = None, **more
) -> Record:
    """The record of an answer whose pieces arrive at the script's seconds, whole or cut in `size` bytes."""
    reader = StreamReader(protocol)
    for at, piece in script:
        for first in range(0, len(piece), size or len(piece)):
            reader.feed(piece[first : first + (size or len(piece))], at)
    end = script[-1][0] if script else 0.0
    reader.close(end)
    fields = {"index": 0, "level": "concurrency 1", "phase": "measured", "status": 200, "started_s": 0.0, "sent_s": 0.0}
    fields |= {"headers_s": 0.0, "ended_s": end, "outcome": outcome_of(reader.events, status=200)} | more
    return Record(events=tuple(reader.events), **fields)


def cuts(data: bytes, places: tuple[int, ...]) -> list[bytes]:
    return [data[a:b] for a, b in pairwise((0, *places, len(data)))]
