"""Effects that each parameter must have, and the verdicts that follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

HONOURED, IGNORED, REJECTED, UNDETERMINED = "honoured", "ignored", "rejected", "undetermined"
_COUNT = "Count from one to ten in words."
_STORY = "Tell me a short story about a river."
_REPEAT = "Say yes yes yes yes yes yes yes yes, and go on."
_WEATHER = "What is the weather in Paris right now? Look it up with the tool."
_COLD, _HOT = {"temperature": 0}, {"temperature": 1.5}
_TOOL = {
    "type": "function",
    "function": {
        "name": "current_weather",
        "description": "The current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# Enough draws that random answers of a dozen tokens are very unlikely to be all the same.
_DRAWS = 3

# Sends a prompt with additional fields of the body and returns an Exchange.
Ask = Callable[[str, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Verdict:
    """Verdict on a parameter, with a sentence of evidence."""

    name: str
    evidence: str


class _Refused(Exception):
    """Raised with the verdict when the server does not answer."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict


def _asked(ask: Ask, prompt: str, fields: Mapping[str, Any]) -> Any:
    """Return the exchange; raise _Refused if the server did not answer."""
    found = ask(prompt, fields)
    if found.refused:
        raise _Refused(Verdict(REJECTED, f"status {found.status}: {_short(found.answer)}"))
    if found.status >= 300:
        raise _Refused(Verdict(UNDETERMINED, f"status {found.status}: {_short(found.answer)}"))
    return found


def _judged(effect: Callable[[Ask], Verdict]) -> Callable[[Ask], Verdict]:
    def judge(ask: Ask) -> Verdict:
        try:
            return effect(ask)
        except _Refused as refused:
            return refused.verdict

    return judge


def _temperature(ask: Ask) -> Verdict:
    cold = [_asked(ask, _STORY, _COLD).text for _ in range(2)]
    hot = _draws(ask, _HOT)
    if len({*cold}) == 1 and len({*hot}) > 1:
        return Verdict(HONOURED, f"2 answers at 0 are the same, {len({*hot})} of {_DRAWS} at 1.5 differ")
    if len({*cold, *hot}) == 1:
        return Verdict(IGNORED, f"2 answers at 0 and {_DRAWS} at 1.5 are all the same")
    return Verdict(UNDETERMINED, "answers at temperature 0 differ from one another")


def _top_p(ask: Ask) -> Verdict:
    return _makes_hot_answers_repeat(ask, {"top_p": 1e-6}, "top_p of 0.000001")


def _seed(ask: Ask) -> Verdict:
    return _makes_hot_answers_repeat(ask, {"seed": 1234}, "the same seed")


def _makes_hot_answers_repeat(ask: Ask, fields: dict[str, Any], what: str) -> Verdict:
    with_it = _draws(ask, {**_HOT, **fields})
    if len({*with_it}) > 1:
        return Verdict(IGNORED, f"{len({*with_it})} of {_DRAWS} answers at temperature 1.5 with {what} differ")
    if len({*_draws(ask, _HOT)}) == 1:
        return Verdict(UNDETERMINED, "answers at temperature 1.5 repeat without it too")
    return Verdict(HONOURED, f"{_DRAWS} answers at temperature 1.5 with {what} are the same, and differ without")


def _stop(ask: Ask) -> Verdict:
    plain = _asked(ask, _COUNT, _COLD).text
    words = plain.split()
    if len(words) < 3:
        return Verdict(UNDETERMINED, f"the answer without it has {len(words)} words: none to stop at")
    mark = next((word for word in words[1:] if len(word) > 2), words[1])
    stopped = _asked(ask, _COUNT, {**_COLD, "stop": [mark]}).text
    if mark not in stopped and len(stopped) < len(plain):
        return Verdict(HONOURED, f"the answer ends before {mark!r}, {len(stopped)} of {len(plain)} characters")
    if stopped == plain:
        return Verdict(IGNORED, f"the answer goes on beyond {mark!r}")
    return Verdict(IGNORED if mark in stopped[: -len(mark)] else HONOURED, f"the answer is {_short(stopped)!r}")


def _max_completion_tokens(ask: Ask) -> Verdict:
    found = _asked(ask, _STORY, {**_COLD, "max_tokens": None, "max_completion_tokens": 4})
    n = found.count("completion_tokens")
    n = len(found.text.split()) if n is None else n
    return Verdict(HONOURED if n <= 4 else IGNORED, f"at most 4 requested, {n} returned")


def _stream(ask: Ask) -> Verdict:
    found = _asked(ask, _COUNT, {**_COLD, "stream": True})
    events = found.answer.count("data:")
    if events >= 2:
        return Verdict(HONOURED, f"{events} events, {found.content_type or 'of no content type'}")
    return Verdict(IGNORED, f"one answer, {found.content_type or 'of no content type'}")


def _penalty(name: str) -> Callable[[Ask], Verdict]:
    def effect(ask: Ask) -> Verdict:
        plain = [_asked(ask, _REPEAT, _COLD).text for _ in range(2)]
        if plain[0] != plain[1]:
            return Verdict(UNDETERMINED, "answers at temperature 0 differ from one another without it")
        more = _asked(ask, _REPEAT, {**_COLD, name: 2.0}).text
        less = ask(_REPEAT, {**_COLD, name: -2.0})  # refused by servers that take no negative ones
        answers = [more, *([less.text] if less.status < 300 else [])]
        changed = next((text for text in answers if text != plain[0]), None)
        if changed is not None:
            return Verdict(HONOURED, f"the greedy answer changes: {_short(changed)!r} for {_short(plain[0])!r}")
        refused = f", and status {less.status} with -2" if less.status >= 300 else " and with -2"
        return Verdict(IGNORED, f"the greedy answer is the same with 2{refused}")

    return effect


def _response_format(ask: Ask) -> Verdict:
    asked = {**_COLD, "response_format": {"type": "json_object"}}
    prompt = "Describe a river as JSON."
    found, plain = _asked(ask, prompt, asked), _asked(ask, prompt, _COLD)
    if _is_object(plain.text):
        return Verdict(UNDETERMINED, "the answer without it is JSON too")
    if _is_object(found.text):
        return Verdict(HONOURED, f"the answer is a JSON object, and without it {_short(plain.text)!r}")
    return Verdict(IGNORED, f"the answer is no JSON object: {_short(found.text)!r}")


def _tools(ask: Ask) -> Verdict:
    found, plain = _asked(ask, _WEATHER, {**_COLD, "tools": [_TOOL]}), _asked(ask, _WEATHER, _COLD)
    if calls := found.message.get("tool_calls"):
        return Verdict(HONOURED, f"the answer calls the tool: {_short(json.dumps(calls))}")
    with_tools, without = (one.count("prompt_tokens") for one in (found, plain))
    if with_tools is not None and without is not None and with_tools > without:
        return Verdict(UNDETERMINED, f"the prompt grew from {without} to {with_tools} tokens, but no tool was called")
    return Verdict(IGNORED, f"no tool is called, and the prompt has {with_tools} tokens with it and {without} without")


def _tool_choice(ask: Ask) -> Verdict:
    named = {"type": "function", "function": {"name": "current_weather"}}
    forced = _asked(ask, _COUNT, {**_COLD, "tools": [_TOOL], "tool_choice": named})
    if not forced.message.get("tool_calls"):
        return Verdict(IGNORED, f"the required tool is not called: {_short(forced.text)!r}")
    never = _asked(ask, _WEATHER, {**_COLD, "tools": [_TOOL], "tool_choice": "none"})
    if never.message.get("tool_calls"):
        return Verdict(IGNORED, 'a tool is called despite "none"')
    return Verdict(HONOURED, 'the named tool is called for an unrelated prompt, and no tool with "none"')


def _draws(ask: Ask, fields: Mapping[str, Any]) -> list[str]:
    return [_asked(ask, _STORY, fields).text for _ in range(_DRAWS)]


def _is_object(text: str) -> bool:
    """Check whether a text is a JSON object, possibly cut off by the token limit."""
    text = text.strip().removeprefix("```json").removesuffix("```").strip()
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return text.startswith("{") and text[1:].lstrip().startswith('"') and not text.endswith("}")


def _short(text: str) -> str:
    whole = " ".join(text.split())
    return whole if len(whole) <= 80 else whole[:77] + "..."


EFFECTS: Mapping[str, Callable[[Ask], Verdict]] = {
    name: _judged(effect)
    for name, effect in {
        "frequency_penalty": _penalty("frequency_penalty"),
        "presence_penalty": _penalty("presence_penalty"),
        "max_completion_tokens": _max_completion_tokens,
        "response_format": _response_format,
        "seed": _seed,
        "stop": _stop,
        "stream": _stream,
        "temperature": _temperature,
        "tool_choice": _tool_choice,
        "tools": _tools,
        "top_p": _top_p,
    }.items()
}
