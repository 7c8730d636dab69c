"""Runs on object stores and other remote places, read file by file through fsspec as they are needed.

A file is copied to the user's cache when it is first used, since safetensors and Parquet are read by memory map. Every
process that reads a run, on whatever machine, fetches what it reads itself.
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
    """Whether a path is the address of a remote place, such as "s3://bucket/run"."""
    return isinstance(path, str) and "://" in path


def mirror_of(address: str) -> Path:
    """The folder that keeps files of the run at `address`, with its meta.json alone; `fetched` gets the others.

    Raises RunError where the address cannot be read or holds no run.
    """
    address = address.rstrip("/")
    meta = _read(f"{address}/meta.json")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / _MIRROR / quote(address, safe="") / hashlib.sha256(meta).hexdigest()[:16]
    _keep(folder / "meta.json", meta)
    return folder


def fetched(path: Path) -> Path:
    """The path, after its file was fetched where it belongs to a remote run and is not here yet."""
    if _MIRROR in path.parts and not path.exists():
        address, _, *names = path.parts[path.parts.index(_MIRROR) + 1 :]
        _keep(path, _read("/".join([unquote(address), *names])))
    return path


def _read(address: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # of whatever client the scheme has
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RunError(
            f"Cannot read {address}: {detail}. Check the address and your access to it; some schemes need a client of "
            "their own, as s3:// needs s3fs.",
            argument="path",
            value=address,
        ) from error


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole, whoever else fetches it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
