"""Detection of API keys in fields, and redaction of a key from server output in any encoding."""

from __future__ import annotations

import logging
import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

MASK = "[key]"
# Names whose last word marks the value as a secret, such as X-RapidAPI-Key and apiKey. A cache key is not a secret.
_SECRET = re.compile(
    r"(?:^|[-_]|(?<=[a-z])(?=[A-Z]))(?<!(?i:cache)[-_])"
    r"(?i:api[-_]?keys?|key|token|secret|password|passwd|passphrase|credentials?|bearer|auth|authorization|cookie)$"
)
# Values that look like a secret under any name.
_KEY_LIKE = re.compile(r"\s*(?:(?i:bearer|basic)\s+\S{8,}|(?:sk-|hf_)[\w-]{16,})\s*")
# Words in one case followed by few digits, as in AZURE_OPENAI_API_KEY_2. No key looks like this.
_VARIABLE = re.compile(r"_*(?:[A-Z]{1,20}|[a-z]{1,20})\d{0,3}(?:_+(?:(?:[A-Z]{1,20}|[a-z]{1,20})\d{0,3}|\d{1,3}))*_*")
_ESCAPES = re.compile(r"%[0-9a-fA-F]{2}|&(?:amp;){0,4}#|\\")
# The logs of httpx and its dependencies quote the server's headers and status line.
_LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


def is_variable(name: object) -> bool:
    """Check whether `name` can be the name of an environment variable rather than a key passed by mistake."""
    if not isinstance(name, str) or _KEY_LIKE.fullmatch(name):
        return False
    return name in os.environ or bool(_VARIABLE.fullmatch(name))


def secret_fields(value: Any, path: str = "", *, named: bool = False) -> Iterator[str]:
    """Yield the paths of values that may be secrets, judged by their own name or that of an enclosing field."""
    if isinstance(value, Mapping):
        # "properties" maps the field names of a tool or a schema to their types, so these names mark no secrets.
        schema = path.rpartition(".")[2] == "properties"
        for name, inner in value.items():
            found = not schema and (named or bool(_SECRET.search(str(name))))
            yield from secret_fields(inner, f"{path}.{name}" if path else str(name), named=found)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from secret_fields(inner, path, named=named)
    elif isinstance(value, str) and (named or _KEY_LIKE.fullmatch(value)):
        yield path


def redacted(text: str, key: str | None) -> str:
    r"""Replace the key by "[key]": plain, escaped as \u002d, %2D or &#45;, in hexadecimal or in base64, mixed or not.

    Call this before shortening the text.
    """
    return text if key is None or not _may_hold(text, key) else _pattern(key).sub(MASK, text)


def redacted_parts(parts: Sequence[str], key: str | None) -> list[str]:
    """Replace the key by "[key]" in consecutive texts, including occurrences that span several of them."""
    whole = "".join(parts)
    if key is None or not _may_hold(whole, key):
        return list(parts)
    spans = [match.span() for match in _pattern(key).finditer(whole)]
    found, at, start = [], 0, 0
    for part in parts:
        end, place, kept = start + len(part), start, []
        while at < len(spans) and spans[at][0] < end:
            first, last = spans[at]
            kept += [whole[place:first], MASK] if first >= start else []
            place = min(last, end)
            if last > end:
                break
            at += 1
        found.append("".join([*kept, whole[place:end]]))
        start = end
    return found


class KeyFilter(logging.Filter):
    """Logging filter that masks the key in the logs of httpx while attached."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key
        _pattern(key)  # compile before any timing starts

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), self._key), ()
        return True

    def attach(self) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)

    def detach(self) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self)


def _may_hold(text: str, key: str) -> bool:
    """Check quickly whether the text may contain the key: `in` is a hundred times as fast as the pattern."""
    return len(text) >= len(key) and (any(form in text for form in _forms(key)) or bool(_ESCAPES.search(text)))


@lru_cache(maxsize=8)
def _forms(key: str) -> tuple[str, ...]:
    """Return the key in plain text, in hexadecimal, and in both base64 alphabets at each of the three alignments."""
    raw = key.encode()
    coded = [b64encode(bytes(before) + raw).decode()[-(-8 * before // 6) :] for before in range(3)]
    coded = [text[: 8 * (before + len(raw)) // 6 - -(-8 * before // 6)] for before, text in enumerate(coded)]
    both = [form for text in coded for form in (text, text.translate(str.maketrans("+/", "-_")))]
    return tuple(dict.fromkeys([key, raw.hex(), raw.hex().upper(), *both]))


@lru_cache(maxsize=8)
def _pattern(key: str) -> re.Pattern[str]:
    plain, *coded = _forms(key)
    forms = ["".join(_spelled(char) for char in plain)]
    forms += ["".join(char if char.isalnum() else _spelled(char) for char in form) for form in coded]
    return re.compile("|".join(forms))


def _spelled(char: str) -> str:
    """Return a pattern for a character in all its escapes, also nested; repetitions are bounded to limit the time."""
    code = "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in f"{ord(char):02x}")
    bare = re.escape(char) if char.isalnum() else rf"\\{{0,8}}{re.escape(char)}"
    escaped = rf"\\{{1,8}}(?:u00|u\{{0{{0,6}}|x){code}\}}?"
    entity = rf"&(?:amp;){{0,4}}#(?:[xX]0{{0,6}}{code}|0{{0,6}}{ord(char)});"
    return rf"(?:{bare}|%(?:25){{0,4}}{code}|{escaped}|{entity})"
