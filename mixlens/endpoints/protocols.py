"""Decoding of stream messages of OpenAI chat and completions, Anthropic Messages and ModelsLab into Events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixlens.endpoints.limits import MAX_NAME_CHARS
from mixlens.endpoints.sse import Message
from mixlens.endpoints.usage import counts_of, usage_of

Messages = Sequence[Mapping[str, Any]]

WireProtocol = Literal["openai-chat", "openai-completions", "anthropic", "modelslab"]

# Path of each protocol, appended to the endpoint's URL.
PATHS: dict[str, str] = {
    "openai-chat": "/chat/completions",
    "openai-completions": "/completions",
    "anthropic": "/messages",
    "modelslab": "/chat/completions",
}
# Fields that request routing from SGLang and vLLM. vLLM also needs a flag at startup, and the token ids. Servers ignore
# unknown fields.
ROUTING = {"return_routed_experts": True, "return_token_ids": True}
REFUSAL = "refusal"
ROUTED = "routed_experts"  # field of the answer that contains routing, on both servers
# Finish reasons of servers, in lower case.
_LENGTH = {"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded", "limit"}
_LENGTH |= {"max_length", "max_new_tokens", "token_limit", "error_limit"}
_FILTERED = {"content_filter", "content_filtered", "refusal", "safety", "prohibited_content", "recitation"}
_FILTERED |= {"guardrail_intervened", "blocklist", "spii", "sensitive", "error_toxic", "image_safety"}
_TOOLS = {"tool_calls", "tool_call", "tool_use", "function_call"}
_BROKEN = {"error", "abort", "aborted", "cancelled", "network_error", "insufficient_system_resource"}
_BROKEN |= {"canceled", "user_cancel", "timeout", "max_time", "time_limit", "engine_overloaded"}
_WHOLE = {"stop", "end_turn", "stop_sequence", "eos", "eos_token", "stop_token", "complete", "completed", "end", "done"}
_WHOLE |= {"finish", "finished"}
# Tags around reasoning within a text, which differ between models and servers.
_NAMES = ("think", "thinking", "thought", "reasoning", "seed:think", "mm:think", "longcat_think")
_TAGS = {f"<{name}>": f"</{name}>" for name in _NAMES}
_TAGS |= {"[THINK]": "[/THINK]", "◁think▷": "◁/think▷", "<|START_THINKING|>": "<|END_THINKING|>"}
_TAGS |= {"<|begin_of_thought|>": "<|end_of_thought|>", "<|inner_prefix|>": "<|inner_suffix|>"}
_TAGS |= {"<|channel>thought": "<channel|>", "<unused94>thought": "<unused95>"}
_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"
# The same tags from a server that omits special tokens.
_BARE_ANALYSIS, _BARE_FINAL = "analysis", "assistantfinal"
_BLANKS = re.compile(r"\s*")

COMMENT, ROLE, TOKEN, REASONING, USAGE, DONE, OTHER = "comment", "role", "token", "reasoning", "usage", "done", "other"
ERROR, MALFORMED = "error", "malformed"
KINDS = (COMMENT, ROLE, TOKEN, REASONING, USAGE, DONE, OTHER, ERROR, MALFORMED)


@dataclass(frozen=True, slots=True)
class Event:
    """One message of a stream, time-stamped before parsing.

    at_s           arrival of its last byte, in seconds on the clock of the run
    kind           comment (a keep-alive); role (a chunk that opens the answer without a token); token (text of the
                   answer or of a tool call); reasoning (only reasoning text); usage (counts without text); done (end of
                   the stream); error; malformed (not JSON, or not the requested format); other
    text           text of a token, an error, a comment or an unknown event
    reasoning      reasoning text, also on a token event with both
    provider       provider that answered, if a router reports it
    model          model that answered, if this message names it
    finish         finish reason, also on a token or usage event with one
    choice         index of the answer if the request has several; None for the first
    input_tokens, output_tokens, cost_usd    counts so far as reported by the server, on any event
    cached_tokens  input tokens from the prefix cache of the server
    reasoning_tokens  output tokens that are reasoning, shown or hidden
    experts, read_bytes, flops   for a forward on this machine: distinct experts of all layers, bytes that it must read,
                   and operations
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
    """Decode a stream message of `protocol` into an Event, without raising for any input."""
    if message.comment:
        return Event(message.at_s, COMMENT, message.data)
    data = message.data.strip()
    if data.strip('"') == "[DONE]":
        return Event(message.at_s, DONE)
    if not data or message.event.replace("-", "") in _KEEPS_ALIVE:
        return Event(message.at_s, COMMENT)
    try:
        data = json.loads(message.data) or {}
    except (ValueError, RecursionError):
        return Event(message.at_s, ERROR if message.event == "error" else MALFORMED, message.data[:200])
    if not isinstance(data, dict):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if (fault := _error_text(data, message.event)) is not None:
        return Event(message.at_s, ERROR, fault, **_common(data))
    form = _FORMS[protocol]
    try:
        kind, text, more = form(data)
    except (AttributeError, KeyError, IndexError, TypeError, RecursionError):
        return Event(message.at_s, MALFORMED, message.data[:200])
    if is_broken(more.get("finish")):
        return Event(message.at_s, ERROR, text or f"finish_reason {more['finish']}", **_common(data))
    return Event(message.at_s, kind, text, **(_common(data) | {k: v for k, v in more.items() if v is not None}))


# Events that only keep the connection open.
_KEEPS_ALIVE = {"ping", "heartbeat", "keepalive", "keep_alive"}
# Fields in which servers describe errors, besides "error".
_SAID = ("message", "messege", "detail", "errors", "error_msg", "error_message", "msg")
# Text fields of answers in other formats. A message with none of them and no choices is a keep-alive.
_ELSEWHERE = {"content", "text", "delta", "message", "token", "tokens", "response", "output", "output_text"}
_ELSEWHERE |= {"generated_text", "candidates", "completion", "answer", "result", "results", "data", "choice"}


def error_message(body: str) -> str:
    """Return the error message in the body of a failed answer, in at most 500 characters."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return " ".join(body.split())[:500]
    fault = _error_text(data, "error") if isinstance(data, dict) else None
    return (fault if fault else " ".join(body.split()))[:500]


def _openai(data: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Decode chat chunks (delta), completions (text) and unstreamed answers (message)."""
    counts = counts_of(data)
    if not counts and not data.keys() & {"choices", "usage"}:
        return OTHER, _refuse() if data.keys() & _ELSEWHERE else json.dumps(data)[:200] if data else "", {}
    text, reasoning, finish, role, index = "", "", None, False, None
    choices = data.get("choices") or []
    choices = [choice for choice in choices if choice is not None] if isinstance(choices, list) else _refuse()
    if len(choices) > 1:
        _refuse()
    for choice in choices:
        index = choice.get("index") or None
        given = "delta" if choice.get("delta") is not None else "message"  # along with a delta: the whole text so far
        delta = choice.get(given) or {}
        shown, thought = message_text(delta)
        text += shown + (choice.get("text") or "")
        reasoning += thought
        role = role or "role" in delta
        finish = REFUSAL if delta.get("refusal") else reason_of(choice.get("finish_reason"))
        if choice.get("error"):
            finish, text = "error", _error_text(choice, "") or text
    kind = _kind(text, counts, finish, role, reasoning)
    return kind, text, {**counts, "finish": finish, "reasoning": reasoning, "choice": index}


# Fields of a message with its reasoning. Gateways send several with the same text.
_REASONING = ("reasoning_content", "reasoning", "thinking", "thinking_blocks", "reasoning_text")


def message_text(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return (text, reasoning) of a message or a delta in any of the formats used by servers."""
    text, thought = blocks_text(message.get("content"))
    own = next((message[name] for name in _REASONING if message.get(name)), "")
    details: Any = message.get("reasoning_details")
    details = details if isinstance(details, list) else []
    if said := own if isinstance(own, str) else "".join(blocks_text(own if isinstance(own, list) else [own])):
        thought += said
    else:  # OpenRouter sends both with the same text
        thought += "".join(one.get("text") or one.get("summary") or "" for one in details)
    functions = [call.get("function") or {} for call in message.get("tool_calls") or []]
    functions += [message.get("function_call") or {}]  # the form before tool_calls
    calls = "".join((one.get("name") or "") + (one.get("arguments") or "") for one in functions)
    return text + (message.get("refusal") or "") + calls, thought


def blocks_text(content: Any) -> tuple[str, str]:
    """Return (text, reasoning) of a content, which is a text, a list of blocks, or None."""
    if not isinstance(content, list):
        return content or "", ""
    text = thought = ""
    for block in content:
        if isinstance(block, str):
            text += block
            continue
        inner = block.get("thinking") or block.get("reasoning") or ""
        thought += inner if isinstance(inner, str) else "".join(blocks_text(inner))
        text += block.get("text") or block.get("partial_json") or block.get("content") or ""
    return text, thought


def without_thinking(text: str) -> tuple[str, str]:
    """Split an answer with tagged reasoning into (text, reasoning); the opening tag may be in the prompt."""
    stop = 0
    while (end := _end_of_thought(text, stop)) > stop:
        stop = end
    return text[stop:], text[:stop]


def _end_of_thought(text: str, start: int) -> int:
    """Return the end of the reasoning that begins at `start`, including its tag; `start` if there is none."""
    at = _BLANKS.match(text, start).end()  # type: ignore[union-attr]
    if text.startswith(_ANALYSIS, at):
        end = text.find(_FINAL, at)
        return len(text) if end < 0 else end + len(_FINAL)
    if text.startswith(_BARE_ANALYSIS, at) and (end := text.find(_BARE_FINAL, at)) >= 0:
        return end + len(_BARE_FINAL)
    for opening, closing in _TAGS.items():
        opened = text.startswith(opening, at)
        end = text.find(closing, at) if opened or start == 0 else -1
        if opened:
            return len(text) if end < 0 else end + len(closing)
        if end >= 0 and opening not in text[:end]:
            return end + len(closing)
    return start


def reason_of(value: Any) -> str | None:
    """Return the finish reason of an answer; None if absent or spelled out as "null" or "None"."""
    value = value.get("type") if isinstance(value, dict) else value  # SGLang's own form
    return None if value in ("null", "None") else name_of(value)


def _plain(finish: str | None) -> str:
    """Normalise a finish reason for the sets above: FinishReason.MAX_TOKENS becomes max_tokens."""
    return (finish or "").rpartition(".")[2].replace("-", "_").lower()


def is_cut(finish: str | None) -> bool:
    """Check whether an answer ended at a length limit."""
    return _plain(finish) in _LENGTH


def is_filtered(finish: str | None) -> bool:
    """Check whether an answer was filtered or refused."""
    return _plain(finish) in _FILTERED


def calls_tool(finish: str | None) -> bool:
    """Check whether an answer ended with a tool call, which is then its text."""
    return _plain(finish) in _TOOLS


def is_broken(finish: str | None) -> bool:
    """Check whether the server broke off the answer."""
    return _plain(finish) in _BROKEN


def is_unknown(finish: str | None) -> bool:
    """Check whether the finish reason is unknown, as "repetition", so that the answer may be incomplete."""
    return bool(finish) and _plain(finish) not in _WHOLE | _LENGTH | _FILTERED | _TOOLS | _BROKEN


def _anthropic(data: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    kind = data["type"]
    if kind == "message_start":
        return ROLE, "", usage_of(data["message"].get("usage")) | {"model": name_of(data["message"].get("model"))}
    if kind == "content_block_delta":
        text, reasoning = blocks_text([data["delta"]])
        return _kind(text, {}, None, False, reasoning), text, {"reasoning": reasoning}
    if kind == "message_delta":
        usage, finish = usage_of(data.get("usage")), reason_of(data["delta"].get("stop_reason"))
        return _kind("", usage, finish, False), "", {**usage, "finish": finish}
    if kind == "message":
        text, reasoning = blocks_text(data["content"])
        usage, finish = usage_of(data.get("usage")), reason_of(data.get("stop_reason"))
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


def _common(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"provider": name_of(data.get("provider")), "model": name_of(data.get("model"))}


def name_of(value: Any) -> str | None:
    """Return a name reported by a server, cut to a maximum length; None if absent."""
    return value[:MAX_NAME_CHARS] if isinstance(value, str) and value else None


def _error_text(data: Mapping[str, Any], event: str) -> str | None:
    error = data.get("error")
    answered = data.get("base_resp")  # of MiniMax, beside every answer
    if not error and isinstance(answered, dict) and answered.get("status_code"):
        error = {"code": answered["status_code"], "message": answered.get("status_msg")}
    if not error or (isinstance(error, dict) and not any(error.values())):
        # ModelsLab answers 200 with {"status": "error", "message": ...}, vLLM 4xx with the message at the top.
        named = next((data[name] for name in _SAID if data.get(name)), None)
        bare = isinstance(named, str) and not data.keys() & {"choices", "type", "usage"}
        if data.get("status") == "error" or data.get("object") == "error" or event == "error" or bare:
            said = named or data
            return said if isinstance(said, str) else json.dumps(said)[:500]
        return None
    if not isinstance(error, dict):
        return str(error)[:500]
    said = error.get("message") or error.get("type") or json.dumps(error)
    code = error.get("code") or error.get("type")
    return (f"{code}: {said}" if code and code != said else str(said))[:500]


def _refuse() -> Any:
    raise KeyError("choices")
