"""JSON files with a checksum of every value and of the whole file, so that edits are detected and located."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixlens.core.size_limits import MOST_CHARS, json_value
from mixlens.errors import RunError

_NO_SEAL = "0" * 64


def json_bytes(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")  # as JSON escapes a lone surrogate


def sealed(value: Mapping[str, Any]) -> bytes:
    """Return `value` as JSON with a short checksum of each value and, at the end, one of all bytes."""
    value = json.loads(json.dumps(value))  # tuples and keys as they will be read back
    data = json_bytes({**value, "checksums": _checksums(value), "sha256": _NO_SEAL})
    head, _, tail = data.rpartition(_NO_SEAL.encode())
    return head + hashlib.sha256(data).hexdigest().encode() + tail


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the sealed value in `path`. Raises RunError with the key if anything was altered."""
    value = read_json(path)
    seal, checksums = value.pop("sha256", None), value.pop("checksums", None)
    if seal is None and checksums is None and value.get("format") == 1:
        return value
    if not isinstance(checksums, dict):
        raise altered(path, "checksums", "checksums is missing")
    found = _checksums(value)
    for key in [*checksums, *found]:
        if found.get(key) != checksums.get(key):
            what = "is missing" if key not in found else "was added" if key not in checksums else "was changed"
            raise altered(path, key, f"{short(key)} {what}")
    if not isinstance(seal, str) or len(seal) != len(_NO_SEAL):
        raise altered(path, "sha256", "sha256 is not a checksum")
    head, _, tail = path.read_bytes().rpartition(seal.encode())
    if hashlib.sha256(head + _NO_SEAL.encode() + tail).hexdigest() != seal:
        raise altered(path, "sha256", "it does not match its sha256")
    return value


def _checksums(value: Mapping[str, Any]) -> dict[str, str]:
    """Return a short checksum of every value, and of each value of nested objects."""
    inner: dict[str, Any] = {}
    for key, one in value.items():
        deep = isinstance(one, dict) and one
        inner |= {f"{key}.{name}": within for name, within in one.items()} if deep else {key: one}
    return {key: hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:8] for key, one in inner.items()}


def altered(path: Path, key: str, what: str) -> RunError:
    return RunError(
        f"Cannot read {path.name} of the run {path.parent}: it was altered: {what}. Restore it from a "
        "copy, or record again into a new folder.",
        argument=key,
        value=str(path),
    )


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RunError for anything else, or for duplicate keys."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise altered(path, path.name, "it is not a regular file")
        if found.st_size > MOST_CHARS:
            raise altered(path, path.name, f"it has {found.st_size:,} bytes")
        value = json_value(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise altered(path, path.name, f"it is not valid JSON ({short(str(error))})") from error
    if not isinstance(value, dict):
        raise altered(path, path.name, f"it holds {type(value).__name__}, not an object")
    return value
