"""Run directories: either complete or absent, written by one process at a time, with every byte checksummed.

`plan.json` (settings, hash of the input) is written first, then shards, and last `meta.json`, which lists every file
with its size and checksum and carries a checksum of itself. The folder `unfinished` holds everything that a finished
run does not keep (partial files, records of committed shards, the lock) and is deleted on completion. A directory
without `meta.json` is an interrupted run, which the same plan resumes. This module knows no model and no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import socket
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version_of
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from mixlens.core.files import REASONS, check_space, disk_errors, sha256_file, shortages, sync
from mixlens.core.hub import SCHEME, present, snapshot_of
from mixlens.core.remote import fetched, is_remote, mirror_of
from mixlens.core.sealed_json import altered, json_bytes, read_json, read_sealed, sealed, short
from mixlens.errors import MixlensError, RunError, visible

try:
    import fcntl
except ImportError:  # Windows: a run directory is not locked there
    fcntl = None

PLAN, META = "plan.json", "meta.json"
UNFINISHED = "unfinished"
# Format 1 kept shard records and partial files beside the others, and meta.json without a checksum. Such runs can be
# opened but not resumed.
_FORMAT = 2
# Command line that writes the next run, kept so that it can be repeated; None if Python code writes it.
_command: ContextVar[Mapping[str, Any] | None] = ContextVar("command", default=None)
# Content of a file: its bytes, or a function that makes them when they are written.
Content = bytes | memoryview | Callable[[], bytes | memoryview]


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of `packages` and of Python; missing packages are left out."""
    found = {name: _version(name) for name in packages}
    return {"python": platform.python_version(), **{name: at for name, at in found.items() if at is not None}}


@cache
def _version(package: str) -> str | None:
    try:
        return _version_of(package)
    except PackageNotFoundError:
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def written_by(command: Mapping[str, Any] | None) -> Iterator[None]:
    """Record `command`, plain JSON values, in the meta.json of the first run that is written in the block."""
    token = _command.set(command)
    try:
        yield
    finally:
        _command.reset(token)


class RunWriter:
    """Writer of one run directory, shard by shard; a killed run resumes where it stopped.

    A context manager: the directory is locked until the end of the block or of the process. If the block fails for lack
    of disk space, memory or permission, that becomes a RunError; committed shards are kept.

      path    the directory; created if missing
      kind    "trace", "eval", "bench" or another of mixlens.registry
      plan    everything that decides the bytes of the run, as plain JSON values; a directory with another plan is
              refused
      leader  True in one of several processes, which alone takes the lock and writes plan.json and meta.json

    `work` is the folder for files that a finished run does not keep; `complete` is True if the whole run exists. Raises
    RunError if the directory holds another run or other files, or another process is writing to it.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: str, plan: Mapping[str, Any], *, leader: bool = True
    ) -> None:
        self.path = Path(path)
        self.work = self.path / UNFINISHED
        self.kind = kind
        self.plan = {"format": _FORMAT, "kind": kind, **json.loads(json.dumps(plan))}
        self._lock: _Lock | None = None
        self._staged: dict[str, Path] = {}
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._began = False
        self._command = _command.get()
        _command.set(None)  # nested runs are parts of this one
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_plan()
            self.complete = (self.path / META).exists()
            if leader and not self.complete:
                self._lock = _Lock(self.work, self.path)
                self._check_plan()  # again, now that nobody else writes
                self.complete = (self.path / META).exists()
                self._began = not self.complete and not (self.path / PLAN).exists()
                if self._began:
                    with self._publishing():
                        self._stage(PLAN, json_bytes(self.plan))
        if leader and self.complete and self.work.exists():  # its process was stopped before cleaning up
            with suppress(RunError, OSError):
                self._lock = self._lock or _Lock(self.work, self.path)
                self.close(clear=True)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, MixlensError):
            self._abandon()
        self.close()
        if isinstance(error, OSError | MemoryError):
            with shortages(self.path):
                raise error

    def close(self, *, clear: bool = False) -> None:
        """Unlock the directory; with `clear`, first delete files that a finished run does not keep."""
        if clear:
            shutil.rmtree(self.work, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def done(self) -> dict[int, dict[str, Any]]:
        """Return the committed shards by index, each {"files": {name: {"sha256", "bytes"}}, **counts}."""
        return {int(p.stem.split("-")[1]): read_sealed(p) for p in sorted(self.work.glob("shard-*.json"))}

    def _abandon(self) -> None:
        """Remove what this writer created if nothing was committed, so that a failed start leaves nothing behind.

        A folder with other files stays, and so does the plan of a run that holds other runs.
        """
        if self._began:
            with suppress(OSError):
                (self.work / _Lock.NAME).unlink()
                self.work.rmdir()
                self.close()  # the process may have too many files open to list a folder with one more
                if [one.name for one in self.path.iterdir()] == [PLAN]:
                    (self.path / PLAN).unlink()
                    for folder in self._made:
                        folder.rmdir()

    def has(self, index: int) -> bool:
        """Return True if a shard is committed and its files are intact; otherwise it is made again."""
        record = self._record(index)
        if not record.exists():
            return False
        try:
            entries = read_sealed(record)["files"].items()
            faults = [f"{name} {fault}" for name, entry in entries if (fault := _fault(self.path / name, entry))]
        except RunError:
            faults = [f"{record.name} was altered"]
        if faults:
            warnings.warn(
                f"Shard {index} of the run {visible(str(self.path))} is made again: {'; '.join(faults)}, after "
                "it was written.",
                stacklevel=3,
            )
        return not faults

    def commit_shard(
        self,
        index: int,
        files: Mapping[str, Content],
        counts: Mapping[str, Any],
        *,
        interim: Mapping[str, Content] | None = None,
    ) -> None:
        """Write every file, then the record that makes the shard count.

        Files appear under their own names only when complete and on disk.

          interim  files whose content goes into the last files of the run; kept in `work` until it is complete

        Raises RunError if the disk is full or not writable; committed shards stay.
        """
        kept = {**files, **{f"{UNFINISHED}/{name}": data for name, data in (interim or {}).items()}}
        with disk_errors(self.path), self._publishing():
            record = {"files": {name: self._stage(name, content) for name, content in kept.items()}, **counts}
            self._stage(f"{UNFINISHED}/{self._record(index).name}", sealed(record))

    def finish(self, meta: Mapping[str, Any], files: Mapping[str, Content], *, runs: Iterable[Path] = ()) -> None:
        """Write the last files and `meta.json`, which completes the run.

        runs  folders of complete runs inside this one
        """
        with disk_errors(self.path), self._publishing(PLAN):
            shards = self.done
            listed = {
                name: entry
                for record in shards.values()
                for name, entry in record["files"].items()
                if not name.startswith(f"{UNFINISHED}/")
            }
            listed |= {name: self._stage(name, content) for name, content in files.items()}
            nested = [(run / META).relative_to(self.path).as_posix() for run in runs]
            listed |= {name: _entry((self.path / name).read_bytes()) for name in (PLAN, *nested)}
            command = {} if self._command is None else {"command": self._command}
            whole = {"format": _FORMAT, "kind": self.kind, **meta, **command, "shards": len(shards), "files": listed}
            self._stage(META, sealed(whole))
        with disk_errors(self.path):
            sync([self.path])
        self.complete = True
        self.close(clear=True)

    @contextmanager
    def _publishing(self, *also: str) -> Iterator[None]:
        """Rename the files staged in the block, in order, once all of them and `also` are on disk."""
        try:
            self.work.mkdir(exist_ok=True)
            yield
            sync([*self._staged.values(), *(self.path / name for name in also)])
            for name, partial in self._staged.items():
                os.replace(partial, self.path / name)
        finally:
            for partial in self._staged.values():
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
            self._staged = {}

    def _stage(self, name: str, content: Content) -> dict[str, Any]:
        """Write a file under a temporary name, and return its entry."""
        data = content() if callable(content) else content
        with disk_errors(self.path, len(data)):
            check_space(self.path, len(data))
            self._staged[name] = self.work / f"{PurePosixPath(name).name}.partial"
            self._staged[name].write_bytes(data)
        return _entry(data)

    def _record(self, index: int) -> Path:
        return self.work / f"shard-{index:05d}.json"

    def _check_plan(self) -> None:
        if not (self.path / PLAN).exists():
            _refuse_strangers(self.path)
            return
        found = read_json(self.path / PLAN)
        different = {k for k in self.plan.keys() | found.keys() if self.plan.get(k) != found.get(k)}
        if (self.path / META).exists():
            different.discard("format")  # a complete run of an earlier version counts as the same
        if different:
            raise RunError(
                f"Cannot write a run to {self.path}: the folder holds another run: "
                f"{_differences(found, self.plan, sorted(different))}. Choose another folder, or delete this one if "
                "you no longer need it.",
                argument="out",
                value=sorted(different),
            )


def _differences(found: dict, asked: dict, keys: list[str]) -> str:
    def show(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else text[:57] + "..."

    if "kind" in keys:  # then everything else differs too
        keys = ["kind"]
    pairs: list[tuple[str, Any, Any]] = []
    for key in keys:
        one, other = found.get(key), asked.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            inner = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
            pairs += [(f"{key}.{name}", one.get(name), other.get(name)) for name in inner]
        else:
            pairs.append((key, one, other))
    return "; ".join(f"{name} is {show(one)}, requested {show(other)}" for name, one, other in pairs[:3])


class _Lock:
    """Exclusive right to write to a run, a kernel lock that is released when the process ends.

    Raises RunError with the name of the process that holds it.
    """

    NAME = "lock"

    def __init__(self, work: Path, run: Path) -> None:
        path = work / self.NAME
        while True:
            work.mkdir(exist_ok=True)
            try:
                self._file = path.open("a+", encoding="utf-8")
            except FileNotFoundError:  # its holder has just cleaned up
                continue
            if not self._taken():
                holder = _holder(path)
                self._file.close()
                raise RunError(
                    f"Cannot write a run to {run}: {holder} is writing to it. Run the same command again after it has "
                    "ended, or choose another folder.",
                    argument="out",
                    value=holder,
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
                    break
            self._file.close()  # the lock belonged to a deleted folder
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}))
        self._file.flush()

    def _taken(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # a network file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        return True

    def release(self) -> None:
        self._file.close()


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text("utf-8"))
        return f"process {held['pid']} on {held['host']}, since {held['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@dataclass
class Run:
    """A complete run on disk. `file(name)` verifies a file's checksum on first use."""

    path: Path
    meta: dict[str, Any]
    check: bool = True
    _checked: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    @property
    def plan(self) -> dict[str, Any]:
        return read_json(self.file(PLAN))

    def file(self, name: str) -> Path:
        """Return the path of a file of this run.

        Raises RunError with the name of the file if it is missing, truncated, altered, or not part of the run.
        """
        path = self.path / name
        if name not in self._checked:
            path = fetched(present(path))
            entry = self.meta["files"].get(name)
            fault = f"is not listed in {META}" if entry is None else _fault(path, entry, contents=self.check)
            if fault:
                raise RunError(
                    f"Cannot read {name} of the run {self.path}: the file {fault}. Restore it from a copy, or record "
                    "again into a new folder.",
                    argument=name,
                    value=path.stat().st_size if path.exists() else None,
                )
            self._checked.add(name)
        return path

    def nested(self, name: str) -> Path | None:
        """Return the folder of a nested run, or None if there is none. Raises RunError as `file` does."""
        if f"{name}/{META}" in self.meta["files"]:
            return self.file(f"{name}/{META}").parent
        return self.path / name if self.meta["format"] == 1 and (self.path / name / META).exists() else None

    def verify(self) -> list[str]:
        """Return the faults of this run and its nested runs, each as "name: fault"; empty if all is intact.

        A file that the run does not list is a fault too.
        """
        files = self.meta["files"]
        at = {name: fetched(present(self.path / name)) for name in files}
        found = [f"{name} {fault}" for name, entry in files.items() if (fault := _fault(at[name], entry))]
        nested = {(self.path / name).parent for name in files if name.endswith(f"/{META}")}
        if self.meta["format"] == 1:  # format 1 did not list nested runs
            nested = {meta.parent for meta in self.path.glob(f"*/**/{META}")}
        for folder in sorted(nested):
            inside = folder.relative_to(self.path).as_posix()
            if not any(fault.startswith(f"{inside}/{META} ") for fault in found):
                found += _faults_inside(folder, inside)
        known = {self.path / META, *(self.path / name for name in files)}
        found += [
            f"{one.relative_to(self.path).as_posix()} is not part of the run" for one in _strays(self, known, nested)
        ]
        return found


def _faults_inside(folder: Path, name: str) -> list[str]:
    try:
        return [f"{name}/{fault}" for fault in open_run(folder).verify()]
    except RunError as error:
        return [f"{name}/{META} cannot be read: {error}"]


def _strays(run: Run, known: set[Path], nested: set[Path]) -> Iterator[Path]:
    """Yield files and folders in a run's folder that are not listed and contain nothing listed."""
    leading = {parent for path in known | nested for parent in path.parents}
    folders = [run.path]
    while folders:
        for one in sorted(folders.pop().iterdir()):
            if one in known or one in nested:
                continue
            if one in leading and one.is_dir() and not one.is_symlink():
                folders.append(one)
            else:
                yield one


def open_run(path: str | os.PathLike[str], kind: str | None = None, *, check: bool = True) -> Run:
    """Return the complete run at `path`. With `check=False`, sizes of files are verified but not checksums.

    Raises RunError if there is no run, it is not finished, it is not of `kind`, or its meta.json was altered. A path
    may be "hf://owner/name", or another address that fsspec knows, such as "s3://bucket/run"; its files are fetched as
    they are used.
    """
    if isinstance(path, str) and path.startswith(SCHEME):
        path = snapshot_of(path)
    path = mirror_of(path) if isinstance(path, str) and is_remote(path) else Path(path)
    try:
        if present(path / META).exists():
            return Run(path, _checked_meta(path, kind), check)
        if (path / PLAN).exists():
            found = plan_at(path).get("kind", "run")
            n = len(list((path / UNFINISHED).glob("shard-*.json")))
            raise RunError(
                f"Cannot open the run at {path}: the {found} was stopped after {n} complete shards. Run the "
                "same command with the same folder again to resume it.",
                argument="shards",
                value=n,
            )
        what = "does not exist" if not path.exists() else f"holds no {PLAN} and no {META}"
    except OSError as error:
        what = f"cannot be read ({REASONS.get(error.errno or 0, error)})"
    raise RunError(
        f"Cannot open a run at {path}: the folder {what}. Pass the folder given as out=.",
        argument="path",
        value=str(path),
    )


def check_out(path: str | os.PathLike[str], kind: str) -> None:
    """Raise RunError unless a run of this kind can be started or continued at `path`. Writes nothing.

    Whether a run there has the same plan is checked later, once the model is loaded.
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
                f"Cannot write a run of kind {kind} to {path}: the folder holds a run of kind {found}. Choose another "
                "folder.",
                argument="out",
                value=found,
            )


def _refuse_strangers(path: Path) -> None:
    """Raise RunError if a folder without a run holds other files."""
    if strangers := sorted(p.name for p in path.iterdir() if p.name != UNFINISHED):
        raise RunError(
            f"Cannot write a run to {path}: the folder is not empty and holds no run of mixlens "
            f"({', '.join(strangers[:3])} ...). Choose an empty or a new folder.",
            argument="out",
            value=strangers,
        )


def plan_at(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the plan of the run at `path`, finished or not; empty if there is none."""
    plan = Path(path) / PLAN
    return read_json(plan) if plan.exists() else {}


def _checked_meta(path: Path, kind: str | None) -> dict[str, Any]:
    meta = read_sealed(path / META)
    for key, fits in (("format", int), ("kind", str), ("shards", int), ("files", dict)):
        if not isinstance(meta.get(key), fits) or (fits is int and not 0 <= meta[key] < 2**32):
            raise altered(path / META, key, f"{key} is {short(meta.get(key, 'missing'))}")
    if meta["format"] > _FORMAT:
        raise RunError(
            f"Cannot open the run at {path}: a newer version of mixlens wrote it (layout {meta['format']}). Use that "
            "version.",
            argument="format",
            value=meta["format"],
        )
    for name, entry in meta["files"].items():
        if not _is_inside(name):
            raise altered(path / META, name, f"the file {short(name)} would lie outside the folder")
        if not (isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and _is_count(entry.get("bytes"))):
            raise altered(path / META, name, f"the entry of {name} is {short(entry)}")
    if kind is not None and meta["kind"] != kind:
        raise RunError(
            f"Cannot open a run of kind {kind} at {path}: the run there is of kind {meta['kind']}. Use "
            "mixlens.open(path), which opens runs of any kind.",
            argument="kind",
            value=meta["kind"],
        )
    return meta


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and not {"/", ".."} & set(parts) and ":" not in name and name.isprintable()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _fault(path: Path, entry: Mapping[str, Any], *, contents: bool = True) -> str | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is not a regular file"
        if found.st_size != entry["bytes"]:
            return f"has {found.st_size} bytes where {entry['bytes']} were written"
        if contents and sha256_file(path) != entry["sha256"]:
            return "does not match the checksum it was written with"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def _entry(data: bytes | memoryview) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
