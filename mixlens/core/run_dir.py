"""The run directory: complete or not there.

`plan.json` is written first (settings, hash of the input), then shards, each committed by a small file with its
checksums, then `meta.json` last. A directory without `meta.json` is a half-done run that the same plan resumes.
Knows no model and no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mixlens.errors import RunError

PLAN, META = "plan.json", "meta.json"
_FORMAT = 1


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of `packages`, with Python's own; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class RunWriter:
    """Writes one run directory, shard by shard, so that a killed run resumes where it stopped.

    path    the directory; made when it is not there
    kind    "trace", "log" or "bench"
    plan    everything that decides the bytes of the run, as plain JSON values; a directory that holds another plan
            is refused
    leader  False in all but one of several processes: the leader alone writes plan.json and meta.json

    `done` maps the shards already committed to their records, `complete` says that the whole run is there.
    Raises RunError when the directory holds another run, or anything that is not a run.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: str, plan: Mapping[str, Any], *, leader: bool = True
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self.plan = {"format": _FORMAT, "kind": kind, **json.loads(json.dumps(plan))}
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with _disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_plan()
            self._began = leader and not (self.path / PLAN).exists()
            if self._began:
                _write_json(self.path / PLAN, self.plan)
        self.complete = (self.path / META).exists()

    @property
    def done(self) -> dict[int, dict[str, Any]]:
        """Committed shards by index, each {"files": {name: {"sha256", "bytes"}}, **counts}."""
        return {int(p.stem.split("-")[1]): _read_json(p) for p in sorted(self.path.glob("shard-*.json"))}

    def abandon(self) -> None:
        """Remove what this writer began, as long as nothing is committed: a start that failed leaves nothing behind."""
        if self._began and not self.done:
            (self.path / PLAN).unlink()
            for folder in self._made:
                if any(folder.iterdir()):
                    break
                folder.rmdir()

    def commit_shard(self, index: int, files: Mapping[str, Callable[[Path], None]], counts: Mapping[str, Any]) -> None:
        """Write every file (a function that is given the path), then the record that makes the shard count.

        Nothing is visible under its own name before it is whole and on disk.
        Raises RunError when the disk is full or unwritable; the shards committed before stay.
        """
        with _disk_errors(self.path):
            record = {"files": {name: self._write(name, write) for name, write in files.items()}, **counts}
            _write_json(self.path / f"shard-{index:05d}.json", record)

    def finish(
        self, meta: Mapping[str, Any], files: Mapping[str, Callable[[Path], None]], *, drop: Sequence[str] = ()
    ) -> None:
        """Write the last files and `meta.json`; after this the run is complete.

        drop   shard files whose content has gone into the last files, and that are deleted
        """
        with _disk_errors(self.path):
            shards = self.done
            listed = {
                name: entry for record in shards.values() for name, entry in record["files"].items() if name not in drop
            }
            listed |= {name: self._write(name, write) for name, write in files.items()}
            listed[PLAN] = _entry(self.path / PLAN)
            _write_json(
                self.path / META,
                {"format": _FORMAT, "kind": self.kind, **meta, "shards": len(shards), "files": listed},
            )
            for name in (*drop, *(f"shard-{index:05d}.json" for index in shards)):
                (self.path / name).unlink()
        self.complete = True

    def _write(self, name: str, write: Callable[[Path], None]) -> dict[str, Any]:
        partial = self.path / f".{name}.{os.getpid()}.partial"
        try:
            write(partial)
            _sync(partial)
            entry = _entry(partial)
            os.replace(partial, self.path / name)
        finally:
            partial.unlink(missing_ok=True)
        return entry

    def _check_plan(self) -> None:
        if not (self.path / PLAN).exists():
            _refuse_strangers(self.path)
            return
        found = _read_json(self.path / PLAN)
        different = sorted(k for k in self.plan.keys() | found.keys() if self.plan.get(k) != found.get(k))
        if different:
            raise RunError(
                f"Cannot write a run to {self.path}: the folder holds another run: "
                f"{_differences(found, self.plan, different)}. Choose another folder, or delete this one if you no "
                "longer need it.",
                argument="out",
                value=different,
            )


def _differences(found: dict, asked: dict, keys: list[str]) -> str:
    def show(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else text[:57] + "..."

    if "kind" in keys:  # then nothing else is the same either
        keys = ["kind"]
    pairs: list[tuple[str, Any, Any]] = []
    for key in keys:
        one, other = found.get(key), asked.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            inner = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
            pairs += [(f"{key}.{name}", one.get(name), other.get(name)) for name in inner]
        else:
            pairs.append((key, one, other))
    return "; ".join(f"{name} is {show(one)}, asked {show(other)}" for name, one, other in pairs[:3])


@dataclass
class Run:
    """A complete run on disk. `file(name)` checks a file against its checksum the first time it is used."""

    path: Path
    meta: dict[str, Any]
    check: bool = True
    _checked: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    @property
    def plan(self) -> dict[str, Any]:
        return _read_json(self.path / PLAN)

    def file(self, name: str) -> Path:
        """Path of a file of this run.

        Raises RunError, naming the file, when it is missing, truncated, or altered.
        """
        path, entry = self.path / name, self.meta["files"][name]
        if name not in self._checked:
            fault = _fault(path, entry, contents=self.check)
            if fault:
                raise RunError(
                    f"Cannot read {name} of the run {self.path}: the file {fault}. Restore it from a copy, or record "
                    "again into a new folder.",
                    argument=name,
                    value=path.stat().st_size if path.exists() else None,
                )
            self._checked.add(name)
        return path

    def verify(self) -> list[str]:
        """Faults of all files, each as "name: what is wrong"; empty when every checksum holds."""
        faults = ((name, _fault(self.path / name, entry)) for name, entry in self.meta["files"].items())
        return [f"{name} {fault}" for name, fault in faults if fault]


def open_run(path: str | os.PathLike[str], *, check: bool = True) -> Run:
    """The complete run at `path`. With `check=False` sizes are compared, but not checksums.

    Raises RunError when there is no run, or when it is not finished.
    """
    path = Path(path)
    if (path / META).exists():
        meta = _read_json(path / META)
        if not isinstance(meta, dict) or not {"kind", "files"} <= meta.keys():
            raise RunError(
                f"Cannot open a run at {path}: mixlens did not write its {META}, which names no kind or no files. "
                "Pass the folder given as out=.",
                argument=META,
                value=str(path),
            )
        return Run(path, meta, check)
    if (path / PLAN).exists():
        kind = _read_json(path / PLAN).get("kind", "run")
        n = len(list(path.glob("shard-*.json")))
        raise RunError(
            f"Cannot open the run at {path}: it is a {kind} that was stopped after {n} complete shards. Run the same "
            "command with the same folder again to resume it.",
            argument="shards",
            value=n,
        )
    what = "is not there" if not path.exists() else "holds no plan.json and no meta.json"
    raise RunError(
        f"Cannot open a run at {path}: the folder {what}. Pass the folder given as out=.",
        argument="path",
        value=str(path),
    )


def check_out(path: str | os.PathLike[str], kind: str) -> None:
    """Raise RunError unless a run of this kind can be begun or continued at `path`. Writes nothing.

    Whether a run there has the same plan is known once the model is loaded, and asked then.
    """
    path = Path(path)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise RunError(
            f"Cannot write a run to {path}: {there} is a file. Choose a new folder.", argument="out", value=str(path)
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(
            f"Cannot write a run to {path}: {there} cannot be written to. Choose a folder of your own.",
            argument="out",
            value=str(path),
        )
    if there == path:
        found = plan_at(path).get("kind", kind) if (path / PLAN).exists() else _refuse_strangers(path)
        if found not in (None, kind):
            raise RunError(
                f"Cannot write a run of kind {kind} to {path}: the folder holds one of kind {found}. Choose another "
                "folder.",
                argument="out",
                value=found,
            )


def _refuse_strangers(path: Path) -> None:
    """Raise RunError for a folder that holds anything that is no run."""
    if strangers := sorted(p.name for p in path.iterdir() if not p.name.endswith(".partial")):
        raise RunError(
            f"Cannot write a run to {path}: the folder is not empty and holds no run of mixlens "
            f"({', '.join(strangers[:3])} ...). Choose an empty or a new folder.",
            argument="out",
            value=strangers,
        )


def plan_at(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plan of the run at `path`, finished or not; empty where there is none."""
    plan = Path(path) / PLAN
    found = _read_json(plan) if plan.exists() else {}
    return found if isinstance(found, dict) else {}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _fault(path: Path, entry: Mapping[str, Any], *, contents: bool = True) -> str | None:
    if not path.exists():
        return "is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"has {size} bytes where {entry['bytes']} were written"
    if contents and sha256_file(path) != entry["sha256"]:
        return "does not match the checksum it was written with"
    return None


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"Cannot read {path.name} of the run {path.parent}: it is not valid JSON ({error}). Restore it from a "
            "copy, or record again into a new folder.",
            argument=path.name,
        ) from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    _sync(partial)
    os.replace(partial, path)


@contextmanager
def _disk_errors(path: Path):
    try:
        yield
    except OSError as error:
        reason = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}.get(
            error.errno or 0, error.strerror or str(error)
        )
        raise RunError(
            f"Cannot write a run to {path}: {reason}. Complete shards are kept; free space or choose another folder, "
            "and run the same command again.",
            argument="path",
            value=str(path),
        ) from error
