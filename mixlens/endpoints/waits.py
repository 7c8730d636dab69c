"""Waiting times that servers request before the next request, in headers or in the body."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

# Headers with the time until a limit is lifted, the most reliable first, and their unit in seconds.
_HEADERS = {
    "retry-after-ms": 1e-3,
    "x-ms-retry-after-ms": 1e-3,
    "retry-after": 1.0,
    "x-ratelimit-reset-requests": 1.0,
    "x-ratelimit-reset-tokens": 1.0,
    "x-ratelimit-reset": 1.0,
    "x-ratelimit-timeremaining": 1.0,
    "ratelimitbysize-reset": 1.0,
    "ratelimit-reset": 1.0,
    "anthropic-ratelimit-requests-reset": 1.0,
    "anthropic-ratelimit-tokens-reset": 1.0,
}
_LIMIT = re.compile(r"\b(?:reset|t)=(\d+)")  # in a RateLimit header, as in two IETF drafts
_SENTENCE = re.compile(
    r"(?:try again in|retry (?:after|in)|wait(?: for)?|resets? in)\s+((?:[\d.]+\s*(?:h|ms|m|s)[a-z]*\s*)+)",
    re.IGNORECASE,
)
_FIELD = re.compile(  # in the body, from Google, from Hugging Face while a model loads, and from gateways
    r'"(?:retryDelay|estimated_time|retry_?after(?:_seconds|_s)?|retry_in|reset_in)"\s*:\s*"?([\d.]+)s?"?\s*[,}\]]',
    re.IGNORECASE,
)
_PARTS = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?")
_SINCE_1970, _MILLISECONDS = 1e9, 1e11


def asked_wait(headers: Mapping[str, str], body: bytes = b"") -> float | None:
    """Return the seconds that a server asks to wait, at least 0; None if it does not say."""
    given = {name.lower(): value for name, value in headers.items()}
    text = body[: 1 << 14].decode("utf-8", "replace")
    given = _passed_on(text) | given
    said = [(given[name], scale) for name, scale in _HEADERS.items() if name in given]
    said += [(found[1], 1.0) for found in [_LIMIT.search(given.get("ratelimit", ""))] if found]
    said += [(found[1], 1.0) for found in (_FIELD.search(text), _SENTENCE.search(text)) if found]
    for value, scale in said:
        if (seconds := _seconds(value)) is not None:
            return max(seconds * scale, 0.0)
    return None


def _passed_on(text: str) -> dict[str, str]:
    """Return the provider's headers, which OpenRouter forwards in the body."""
    try:
        inner: Any = json.loads(text)["error"]["metadata"]["headers"]
        return {str(name).lower(): str(value) for name, value in inner.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _seconds(value: str) -> float | None:
    """Parse "20", "6m0.5s", "6 seconds", a date, or a Unix time in seconds or milliseconds into seconds from now."""
    value = value.strip()
    try:
        number = float(value)
    except ValueError:
        short = re.sub(r"\s*(h|ms|m|s)[a-z]*\s*", r"\1", value.lower())
        if value and (parts := _PARTS.fullmatch(short)):
            return sum(float(p or 0) * s for p, s in zip(parts.groups(), (3600, 60, 1, 1e-3), strict=True))
        return _until(value)
    if not math.isfinite(number):
        return None
    since = number / 1000 if number > _MILLISECONDS else number
    return since - time.time() if since > _SINCE_1970 else number


def _until(value: str) -> float | None:
    """Return the seconds until an HTTP or ISO 8601 date."""
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            date = parse(value)
        except (ValueError, TypeError):
            continue
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    return None
