"""Runs in object stores and other remote places, fetched file by file through fsspec.

A file is copied to the user's cache when it is first used, because safetensors and Parquet are memory-mapped. Each
process fetches the files that it reads, on whatever machine it runs.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

from mixlens.errors import RunError

_MIRROR = "mixlens-remote"


def is_remote(path: object) -> bool:
    """Return True if the path is a remote address, such as "s3://bucket/run"."""
    return isinstance(path, str) and "://" in path


def mirror_of(address: str) -> Path:
    """Return the local mirror of the run at `address`, holding only its meta.json; `fetched` gets the other files.

    Raises RunError if the address cannot be read or holds no run.
    """
    address = address.rstrip("/")
    meta = _read(f"{address}/meta.json")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / _MIRROR / quote(address, safe="") / hashlib.sha256(meta).hexdigest()[:16]
    _keep(folder / "meta.json", meta)
    return folder


def fetched(path: Path) -> Path:
    """Return the path, after fetching its file if it belongs to a remote run and is not cached yet."""
    if _MIRROR in path.parts and not path.exists():
        address, _, *names = path.parts[path.parts.index(_MIRROR) + 1 :]
        _keep(path, _read("/".join([unquote(address), *names])))
    return path


def _read(address: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # clients of schemes raise errors of their own
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RunError(
            f"Cannot read {address}: {detail}. Check the address and your access to it; some schemes need an extra "
            "client, such as s3fs for s3://.",
            argument="path",
            value=address,
        ) from error


def _keep(path: Path, content: bytes) -> None:
    """Write a file atomically, even if other processes fetch it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
