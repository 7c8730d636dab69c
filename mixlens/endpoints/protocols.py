"""What a stream message means: OpenAI chat and completions, Anthropic Messages, ModelsLab, into one kind of event."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixlens.endpoints.limits import MAX_NAME_CHARS
from mixlens.endpoints.sse import Message

Messages = Sequence[Mapping[str, Any]]

WireProtocol = Literal["openai-chat", "openai-completions", "anthropic", "modelslab"]

# Path of each protocol, appended to the endpoint's URL.
PATHS: dict[WireProtocol, str] = {
    "openai-chat": "/chat/completions",
    "openai-completions": "/completions",
    "anthropic": "/messages",
    "modelslab": "/chat/completions",
}
# What asks a server for routing: SGLang's field and vLLM's, which is switched on at its start and needs ids of tokens
# besides. What a server does not know, it leaves aside.
ROUTING = {"return_routed_experts": True, "return_token_ids": True}
ROUTED = "routed_experts"  # the field that it comes in, of both
# Reasons for the end of an answer, as servers name them.
LENGTH = frozenset({"length", "max_tokens", "max_output_tokens", "MAX_TOKENS"})
FILTERED = frozenset({"content_filter", "refusal", "safety", "SAFETY", "prohibited_content"})
_THINK, _THOUGHT = "<think>", "</think>"

COMMENT, ROLE, TOKEN, REASONING, USAGE, DONE, OTHER = "comment", "role", "token", "reasoning", "usage", "done", "other"
ERROR, MALFORMED = "error", "malformed"
KINDS = (COMMENT, ROLE, TOKEN, REASONING, USAGE, DONE, OTHER, ERROR, MALFORMED)


@dataclass(frozen=True, slots=True)
class Event:
    """One message of a stream, stamped before it was parsed.

    at_s           seconds on the run's clock, when its last byte arrived
    kind           comment (a keep-alive); role (a chunk that opens the answer and carries no token); token (text of the
                   answer or a tool call); reasoning (text of reasoning alone); usage (counts without text); done (the
                   end, by name); error; malformed (no JSON, or not the form that was asked for); other
    text           of a token, an error or a comment
    reasoning      text of reasoning, also on a token event that brings both
    provider       who answered, when a router says so
    model          the model that answered, where it is named for the first time or anew
    finish         the reason given for the end; also on a token or usage event that brings it along
    choice         which of several answers to the request this is; None for the first
    input_tokens, output_tokens, cost_usd    the server's own count so far, on whichever event it rides
    cached_tokens  of the input tokens, those that the server had in its prefix cache
    reasoning_tokens  of the output tokens, those that are reasoning, shown or hidden
    experts, read_bytes, flops   of the forward on this machine that made the token: distinct experts of all layers,
                   bytes that it must read, and operations
    """

    at_s: float
    kind: str
    text: str = ""
    reasoning: str = ""
    provider: str | None = None
    model: str | None = None
    finish: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost_usd: float | None = None
    choice: int | None = None
    experts: int | None = None
    read_bytes: int | None = None
    flops: int | None = None


def decode(message: Message, protocol: str) -> Event:
    """The event that a message of a stream in `protocol` is; nothing that a server sends makes it raise."""
    if message.comment:
        return Event(message.at_s, COMMENT, message.data)
    data = message.data.strip()
    if data == "[DONE]":
        return Event(message.at_s, DONE)
    if not data:
        return Event(message.at_s, COMMENT)
    try:
        data = json.loads(message.data)
    except (ValueError, RecursionError):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if not isinstance(data, dict):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if (fault := _error_text(data, message.event)) is not None:
        return Event(message.at_s, ERROR, fault, **_common(data))
    if message.event == "ping":
        return Event(message.at_s, COMMENT)
    form = _FORMS[protocol]
    try:
        kind, text, more = form(data)
    except (AttributeError, KeyError, IndexError, TypeError, RecursionError):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if more.get("finish") == "error":
        return Event(message.at_s, ERROR, text or "finish_reason error", **_common(data))
    return Event(message.at_s, kind, text, **(_common(data) | {k: v for k, v in more.items() if v is not None}))


def error_message(body: str) -> str:
    """What the body of a failed answer says, in at most 500 characters."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return " ".join(body.split())[:500]
    fault = _error_text(data, "error") if isinstance(data, dict) else None
    return (fault if fault else " ".join(body.split()))[:500]


def _openai(data: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Chat chunks (delta), completions (text), and answers that were not streamed (message)."""
    if "choices" not in data and "usage" not in data:
        return (COMMENT if data.get("type") == "ping" else _refuse()), "", {}
    text, reasoning, finish, role, index = "", "", None, False, None
    choices = data.get("choices") or []
    if len(choices) > 1:
        _refuse()
    for choice in choices:
        index = choice.get("index") or None
        delta = choice.get("delta") or choice.get("message") or {}
        shown, thought = message_text(delta)
        text += shown + (choice.get("text") or "")
        reasoning += thought
        role = role or "role" in delta
        finish = name_of(choice.get("finish_reason")) or finish
    usage = usage_of(data.get("usage"))
    kind = _kind(text, usage, finish, role, reasoning)
    return kind, text, {**usage, "finish": finish, "reasoning": reasoning, "choice": index}


def message_text(message: Mapping[str, Any]) -> tuple[str, str]:
    """(text, reasoning) of a message or a delta, in every form in which servers give them."""
    text, thought = blocks_text(message.get("content"))
    own = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    details: Any = message.get("reasoning_details")
    details = details if isinstance(details, list) else []
    if isinstance(own, str) and own:
        thought += own
    else:  # OpenRouter gives both, with the same text
        thought += "".join(one.get("text") or one.get("summary") or "" for one in details)
    calls = "".join(
        (call.get("function", {}).get("name") or "") + (call.get("function", {}).get("arguments") or "")
        for call in message.get("tool_calls") or []
    )
    return text + (message.get("refusal") or "") + calls, thought


def blocks_text(content: Any) -> tuple[str, str]:
    """(text, reasoning) of a content, which is a text, a list of blocks, or nothing."""
    if not isinstance(content, list):
        return content or "", ""
    text = thought = ""
    for block in content:
        if isinstance(block, str):
            text += block
            continue
        inner = block.get("thinking") or block.get("reasoning") or ""
        thought += inner if isinstance(inner, str) else "".join(blocks_text(inner))
        text += block.get("text") or block.get("partial_json") or ""
    return text, thought


def without_thinking(text: str) -> tuple[str, str]:
    """(text, reasoning) of an answer whose reasoning stands between <think> tags; the first may be in the prompt."""
    start, end = text.find(_THINK), text.find(_THOUGHT)
    opened = start >= 0 and not text[:start].strip()
    if not opened and (end < 0 or 0 <= start < end):
        return text, ""
    stop = len(text) if end < 0 else end + len(_THOUGHT)
    return text[stop:], text[:stop]


def _anthropic(data: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    kind = data["type"]
    if kind == "message_start":
        return ROLE, "", usage_of(data["message"].get("usage")) | {"model": name_of(data["message"].get("model"))}
    if kind == "content_block_delta":
        text, reasoning = blocks_text([data["delta"]])
        return _kind(text, {}, None, False, reasoning), text, {"reasoning": reasoning}
    if kind == "message_delta":
        usage, finish = usage_of(data.get("usage")), name_of(data["delta"].get("stop_reason"))
        return _kind("", usage, finish, False), "", {**usage, "finish": finish}
    if kind == "message":
        text, reasoning = blocks_text(data["content"])
        usage, finish = usage_of(data.get("usage")), name_of(data.get("stop_reason"))
        return _kind(text, usage, finish, True, reasoning), text, {**usage, "finish": finish, "reasoning": reasoning}
    if kind == "content_block_start":
        text, reasoning = blocks_text([data["content_block"]])
        return _kind(text, {}, None, True, reasoning), text, {"reasoning": reasoning}
    return {"ping": COMMENT, "message_stop": DONE}.get(kind, OTHER), "", {}


_FORMS: dict[str, Callable[[dict[str, Any]], tuple[str, str, dict[str, Any]]]] = {
    "openai-chat": _openai,
    "openai-completions": _openai,
    "modelslab": _openai,
    "anthropic": _anthropic,
}


def _kind(text: str, usage: Mapping[str, Any], finish: str | None, role: bool, reasoning: str = "") -> str:
    if text or reasoning:
        return TOKEN if text else REASONING
    if usage.get("output_tokens") is not None:
        return USAGE
    return DONE if finish else ROLE if role else OTHER


def usage_of(usage: Any) -> dict[str, Any]:
    """The counts of a usage object, by the names of an Event; None for what it does not say."""
    if not isinstance(usage, dict):
        return {}
    read, written = _count(usage.get("cache_read_input_tokens")), _count(usage.get("cache_creation_input_tokens"))
    given = _count(usage.get("prompt_tokens"))
    if given is None and (given := _count(usage.get("input_tokens"))) is not None:
        given += (read or 0) + (written or 0)  # Anthropic counts them apart
    cached = [
        _inner(usage, "prompt_tokens_details", "cached_tokens"),
        _inner(usage, "input_tokens_details", "cached_tokens"),
    ]
    cached += [_count(usage.get("prompt_cache_hit_tokens")), read]
    thought = [
        _inner(usage, "completion_tokens_details", "reasoning_tokens"),
        _inner(usage, "output_tokens_details", "reasoning_tokens"),
        _count(usage.get("reasoning_tokens")),
    ]
    made = _count(usage.get("completion_tokens"))
    cost = next((usage[name] for name in ("cost", "estimated_cost") if _is_number(usage.get(name))), None)
    return {
        "input_tokens": given,
        "output_tokens": _count(usage.get("output_tokens")) if made is None else made,
        "cached_tokens": next((n for n in cached if n is not None), None),
        "reasoning_tokens": next((n for n in thought if n is not None), None),
        "cost_usd": None if cost is None else float(cost),
    }


def _inner(usage: Mapping[str, Any], part: str, name: str) -> int | None:
    details = usage.get(part)
    return _count(details.get(name)) if isinstance(details, dict) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _common(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"provider": name_of(data.get("provider")), "model": name_of(data.get("model"))}


def name_of(value: Any) -> str | None:
    """A name that a server gives, of bounded length; None where it gives none."""
    return value[:MAX_NAME_CHARS] if isinstance(value, str) and value else None


def _error_text(data: Mapping[str, Any], event: str) -> str | None:
    error = data.get("error")
    if not error:
        # ModelsLab answers 200 with {"status": "error", "message": ...}, vLLM 4xx with the message at the top.
        if data.get("status") == "error" or event == "error":
            said = next((data[name] for name in ("message", "messege", "detail") if data.get(name)), data)
            return said if isinstance(said, str) else json.dumps(said)[:500]
        return None
    if not isinstance(error, dict):
        return str(error)[:500]
    said = error.get("message") or error.get("type") or json.dumps(error)
    code = error.get("code") or error.get("type")
    return (f"{code}: {said}" if code and code != said else str(said))[:500]


def _refuse() -> Any:
    raise KeyError("choices")
