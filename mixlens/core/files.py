"""Atomic file writes, and readable errors for full or unwritable disks."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mixlens.errors import RunError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EMFILE: "this process has too many files open (ulimit -n)",
    errno.ENFILE: "the system has too many files open",
    errno.ENOMEM: "there is no memory left",
    errno.EIO: "the disk failed",
}
# Errors that mean a resource is exhausted, rather than that one file is refused.
SCARCE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def check_space(path: str | os.PathLike[str], needed: int) -> None:
    """Raise RunError if the disk of `path` has less than `needed` bytes free."""
    if needed > (free := _free(Path(path))):
        raise _refused(Path(path), REASONS[errno.ENOSPC], needed, free)


def write_file(path: str | os.PathLike[str], content: bytes | str | Callable[[], bytes | str]) -> Path:
    """Write a file atomically: an existing file is kept until the new one is on disk.

      content  bytes or text, or a function that returns them

    Raises RunError if the file cannot be written, or its content cannot be made for lack of memory or open files.
    """
    with shortages(Path(path)):
        data = content() if callable(content) else content
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with written_whole(path, len(data)) as partial:
        partial.write_bytes(data)
    return Path(path)


@contextmanager
def written_whole(path: str | os.PathLike[str], needed: int = 0) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends, and is deleted if it fails."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe, or the terminal
        with disk_errors(path, needed):
            yield path
        return
    partial = path.with_name(f".{path.stem[:40]}.partial{path.suffix}")  # one name: the next call replaces a leftover
    with disk_errors(path, needed):
        check_space(path.parent, needed)
        try:
            yield partial
            sync([partial])
            if path.exists():
                shutil.copymode(path, partial)
            os.replace(partial, path.resolve() if path.is_symlink() else path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 2**63


def _refused(path: Path, reason: str, needed: int, free: int) -> RunError:
    room = f" ({needed:,} bytes needed, {free:,} free)" if needed else f" ({free:,} bytes free)"
    return RunError(
        f"Cannot write {path}: {reason}{room}. What was complete is kept; make room or choose another place, and run "
        "the same command again.",
        argument="path",
        value=str(path),
    )


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = REASONS.get(error.errno or 0, error.strerror or str(error))
        raise _refused(path, reason, needed, _free(path)) from error
    except MemoryError as error:
        raise _refused(path, REASONS[errno.ENOMEM], needed, _free(path)) from error


@contextmanager
def shortages(path: Path, errors: Container[int | None] = REASONS) -> Iterator[None]:
    """Report resources that run out while content for `path` is made as RunError, as when writing.

    errors  error numbers to report; others propagate unchanged
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno not in errors:
            raise
        with disk_errors(path):
            raise


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(paths: Iterable[Path]) -> None:
    """Flush files, or the entries of a folder, to disk; all at once, so that a journal commits them together."""

    def to_disk(path: Path) -> None:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync folders
                raise
        finally:
            os.close(file)

    first, *others = paths
    with ThreadPoolExecutor(min(8, len(others)) or 1) as pool:
        started = [pool.submit(to_disk, path) for path in others]
        to_disk(first)
    for done in started:
        done.result()
