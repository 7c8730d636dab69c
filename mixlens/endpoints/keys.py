"""API keys: where a field seems to hold one, and how one is taken out of what a server says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Names whose last word marks the value as a secret, such as X-RapidAPI-Key and apiKey. A cache key is not a secret.
_SECRET = re.compile(
    r"(?:^|[-_]|(?<=[a-z])(?=[A-Z]))(?<!(?i:cache)[-_])"
    r"(?i:api[-_]?keys?|key|token|secret|password|passwd|passphrase|credentials?|bearer|auth|authorization|cookie)$"
)
# Values that look like a secret under any name.
_KEY_LIKE = re.compile(r"\s*(?:(?i:bearer|basic)\s+\S{8,}|(?:sk-|hf_)[\w-]{16,})\s*")


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
    """Replace the key, plain or JSON-escaped, by "[key]". Call this before shortening the text."""
    if key is None:
        return text
    escaped = json.dumps(key)[1:-1]
    for form in (escaped.replace("/", "\\/"), escaped, key):
        text = text.replace(form, "[key]")
    return text
