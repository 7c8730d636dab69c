"""What a stream message means: OpenAI chat and completions, Anthropic Messages, ModelsLab, into one kind of event."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixlens.endpoints.sse import Message

COMMENT, ROLE, TOKEN, USAGE, DONE, OTHER = "comment", "role", "token", "usage", "done", "other"
ERROR, MALFORMED = "error", "malformed"
KINDS = (COMMENT, ROLE, TOKEN, USAGE, DONE, OTHER, ERROR, MALFORMED)


@dataclass(frozen=True, slots=True)
class Event:
    """One message of a stream, stamped before it was parsed.

    at_s           seconds on the run's clock, when its last byte arrived
    kind           comment (a keep-alive); role (a chunk that opens the answer and carries no token); token (text of the
                   answer, its reasoning or a tool call); usage (counts without text); done (the end, by name); error;
                   malformed (no JSON, or not the form that was asked for); other
    text           of a token, an error or a comment
    provider       who answered, when a router says so
    finish         the reason given for the end; also on a token or usage event that brings it along
    input_tokens, output_tokens, cost_usd    the server's own count so far, on whichever event it rides
    experts, read_bytes, flops   of the forward on this machine that made the token: distinct experts of all layers,
                   bytes that it must read, and operations
    """

    at_s: float
    kind: str
    text: str = ""
    provider: str | None = None
    finish: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    experts: int | None = None
    read_bytes: int | None = None
    flops: int | None = None


def decode(message: Message, protocol: str) -> Event:
    """The event that a message of a stream in `protocol` is; nothing that a server sends makes it raise."""
    if message.comment:
        return Event(message.at_s, COMMENT, message.data)
    if message.data.strip() == "[DONE]":
        return Event(message.at_s, DONE)
    try:
        data = json.loads(message.data)
    except (ValueError, RecursionError):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if not isinstance(data, dict):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if (fault := _error_text(data, message.event)) is not None:
        return Event(message.at_s, ERROR, fault, **_common(data))
    form = _FORMS[protocol]
    try:
        kind, text, more = form(data)
    except (AttributeError, KeyError, IndexError, TypeError):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if more.get("finish") == "error":
        return Event(message.at_s, ERROR, text or "finish_reason error", **_common(data))
    return Event(message.at_s, kind, text, **(_common(data) | more))


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
    choices = data["choices"] if "choices" in data else [] if "usage" in data else _refuse()
    text, finish, role = "", None, False
    for choice in choices:
        delta = choice.get("delta") or choice.get("message") or {}
        text += _chat_text(delta) + (choice.get("text") or "")
        role = role or "role" in delta
        finish = _name(choice.get("finish_reason")) or finish
    usage = _usage(data.get("usage"), "prompt_tokens", "completion_tokens")
    return _kind(text, usage, finish, role), text, {**usage, "finish": finish}


def _chat_text(delta: Mapping[str, Any]) -> str:
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    content = delta.get("content") or ""
    calls = "".join(
        (call.get("function", {}).get("name") or "") + (call.get("function", {}).get("arguments") or "")
        for call in delta.get("tool_calls") or []
    )
    return reasoning + content + (delta.get("refusal") or "") + calls


def _anthropic(data: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    kind = data["type"]
    if kind == "message_start":
        return ROLE, "", _usage(data["message"].get("usage"), "input_tokens", "output_tokens")
    if kind == "content_block_delta":
        delta = data["delta"]
        text = delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
        return _kind(text, {}, None, False), text, {}
    if kind == "message_delta":
        usage, finish = (
            _usage(data.get("usage"), "input_tokens", "output_tokens"),
            _name(data["delta"].get("stop_reason")),
        )
        return _kind("", usage, finish, False), "", {**usage, "finish": finish}
    if kind == "message":
        text = "".join(block.get("text") or "" for block in data["content"])
        usage, finish = _usage(data.get("usage"), "input_tokens", "output_tokens"), _name(data.get("stop_reason"))
        return _kind(text, usage, finish, True), text, {**usage, "finish": finish}
    known = {"ping": COMMENT, "content_block_start": ROLE, "content_block_stop": OTHER, "message_stop": DONE}
    return known.get(kind, OTHER), "", {}


_FORMS: dict[str, Callable[[dict[str, Any]], tuple[str, str, dict[str, Any]]]] = {
    "openai-chat": _openai,
    "openai-completions": _openai,
    "modelslab": _openai,
    "anthropic": _anthropic,
}


def _kind(text: str, usage: Mapping[str, Any], finish: str | None, role: bool) -> str:
    if text:
        return TOKEN
    if usage.get("output_tokens") is not None:
        return USAGE
    return DONE if finish else ROLE if role else OTHER


def _usage(usage: Any, asked: str, given: str) -> dict[str, Any]:
    if not isinstance(usage, dict):
        return {}
    counts = {"input_tokens": _count(usage.get(asked)), "output_tokens": _count(usage.get(given))}
    cost = next((usage[name] for name in ("cost", "estimated_cost") if _is_number(usage.get(name))), None)
    return {**counts, "cost_usd": None if cost is None else float(cost)}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _common(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"provider": _name(data.get("provider"))}


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


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
