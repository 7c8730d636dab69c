"""Token counts in the answers of servers, converted to the field names of an Event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_CACHED = ("cached_tokens", "prompt_cache_hit_tokens", "num_cached_tokens", "cached_prompt_tokens")
_ANTHROPIC_CACHED = ("cache_read_input_tokens", "cache_creation_input_tokens")


def counts_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of a message from its usage, or from the timings of llama.cpp.

    Moonshot puts the usage into a choice, Groq under x_groq.
    """
    choices = data.get("choices")
    inner = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    groq = data.get("x_groq")
    places = (data, *inner, groq if isinstance(groq, dict) else {})
    usage = next((usage_of(place["usage"]) for place in places if isinstance(place.get("usage"), dict)), {})
    timings = _timings(data.get("timings"), usage.get("input_tokens"))
    return {**usage, **timings, **{name: value for name, value in usage.items() if value is not None}}


def _timings(timings: Any, given: int | None) -> dict[str, Any]:
    """Return the counts of llama.cpp's timings, whose prompt count excludes cached tokens; the prompt has `given`."""
    if not isinstance(timings, dict):
        return {}
    cached, read = count(timings.get("cache_n")), count(timings.get("prompt_n"))
    if cached is None and read is not None and given is not None and given >= read:
        cached = given - read
    found = {"input_tokens": None if read is None else read + (cached or 0), "cached_tokens": cached}
    return found | {"output_tokens": count(timings.get("predicted_n"))}


def usage_of(usage: Any) -> dict[str, Any]:
    """Return the counts of a usage object by the field names of an Event; None for missing ones."""
    if not isinstance(usage, dict):
        return {}
    read, written = (count(usage.get(name)) for name in _ANTHROPIC_CACHED)
    given = count(usage.get("prompt_tokens"))
    if given is None and (given := count(usage.get("input_tokens"))) is not None:
        given += (read or 0) + (written or 0)  # Anthropic does not include them in input_tokens
    details = (_inner(usage, part, "cached_tokens") for part in ("prompt_tokens_details", "input_tokens_details"))
    made = count(usage.get("completion_tokens"))
    made = count(usage.get("output_tokens")) if made is None else made
    thought = next((n for n in _reasoning_counts(usage) if n is not None), None)
    if made is not None and thought and (thought > made or _apart(usage, given, made, thought)):
        made += thought
    cost = next((usage[name] for name in ("cost", "estimated_cost") if _is_number(usage.get(name))), None)
    return {
        "input_tokens": given,
        "output_tokens": made,
        "cached_tokens": _first(*details, *(count(usage.get(name)) for name in _CACHED), read),
        "reasoning_tokens": thought,
        "cost_usd": None if cost is None else float(cost),
    }


def _apart(usage: Mapping[str, Any], given: int | None, made: int, thought: int) -> bool:
    """Check by the total whether reasoning tokens are not included in completion tokens, as at xAI."""
    total = count(usage.get("total_tokens"))
    return total is not None and given is not None and total == given + made + thought


def _reasoning_counts(usage: Mapping[str, Any]) -> Iterator[int | None]:
    yield _inner(usage, "completion_tokens_details", "reasoning_tokens")
    yield _inner(usage, "output_tokens_details", "reasoning_tokens")
    yield _inner(usage, "output_tokens_details", "thinking_tokens")
    yield count(usage.get("reasoning_tokens"))


def _first(*counts: int | None) -> int | None:
    return next((n for n in counts if n is not None), None)


def _inner(usage: Mapping[str, Any], part: str, name: str) -> int | None:
    details = usage.get(part)
    return count(details.get(name)) if isinstance(details, dict) else None


def count(value: Any) -> int | None:
    """Return a token count, which JavaScript gateways may write as 12.0; None if the value is not a count."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9
