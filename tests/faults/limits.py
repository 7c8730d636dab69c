"""Too little of something: file sizes, open files, memory, disk. The call ends in words, and goes on with enough."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
from kills import Layer, again, in_child, undisturbed
from verbs import VERBS

from mixlens.errors import MixlensError

_IN_WORDS, _RAW = 10, 11
REFUSALS = ("EDQUOT", "EROFS", "ENOSPC", "EIO", "EMFILE", "EFBIG")


def _file_size(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return limit


def _open_files(more: int) -> Callable[[], None]:
    def limit() -> None:
        taken = os.open(os.devnull, os.O_RDONLY)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        while (taken := os.dup(taken)) <= highest:  # the gaps that the tests before have left
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1 + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    return limit


def _memory(more: int) -> Callable[[], None]:
    def limit() -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.getrlimit(resource.RLIMIT_AS)[1]))

    return limit


LIMITS: dict[str, list[Callable[[], None]]] = {
    "file size": [_file_size(size) for size in (0, 1, 300, 1000, 3000, 10_000)],
    "open files": [_open_files(more) for more in range(6)],
    "memory": [_memory(more) for more in (16 << 20, 32 << 20, 64 << 20)],
}


def limited(verb: str, folder: Path, what: str) -> Iterator[tuple[str, str | None]]:
    """(the limit, what was wrong: another end than a named error or success, or the contents afterwards)."""
    whole = undisturbed(verb, folder)
    for number, limit in enumerate(LIMITS[what]):
        out = folder / "limited"
        ended, status = in_child(_calling(verb, out, limit))
        wrong = again(verb, out, whole)
        if ended or status not in (0, _IN_WORDS):
            wrong = f"ended with signal {ended}" if ended else "raised what is no MixlensError"
        yield f"{what} {number}", wrong
        shutil.rmtree(out, ignore_errors=True)


def refused(verb: str, folder: Path, every: int = 1, start: int = 0) -> Iterator[tuple[str, str | None]]:
    """(operation from which on the disk refuses all, what was wrong), until the call does not need any of them."""
    whole = undisturbed(verb, folder)
    for first in itertools.count(start, every):
        name = REFUSALS[first // every % len(REFUSALS)]
        out = folder / "refused"
        ended, status = in_child(_calling(verb, out, partial(Layer, out, first, getattr(errno, name))))
        if not ended and not status:
            return
        wrong = again(verb, out, whole)
        if ended or status != _IN_WORDS:
            wrong = f"ended with signal {ended}" if ended else "raised what is no MixlensError"
        yield f"{name} from operation {first}", wrong
        shutil.rmtree(out, ignore_errors=True)


def full_disk(verb: str, folder: Path, sizes: tuple[int, ...]) -> Iterator[tuple[str, str | None]]:
    """On file systems in memory with room for a part of the run; nothing where they cannot be mounted."""
    whole = undisturbed(verb, folder)
    disk = folder / "disk"
    disk.mkdir()
    for kilobytes in sizes:
        options = f"size={kilobytes}k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True).returncode:
            return
        try:
            ended, status = in_child(_calling(verb, disk / "run", lambda: None))
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            wrong = again(verb, disk / "run", whole)
            if ended or status not in (0, _IN_WORDS):
                wrong = f"ended with signal {ended}" if ended else "raised what is no MixlensError"
            yield f"disk of {kilobytes} kB", wrong
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def _calling(verb: str, out: Path, limit: Callable[[], object]) -> Callable[[], int]:
    def act() -> int:
        limit()
        try:
            VERBS[verb](out)
        except MixlensError:
            return _IN_WORDS
        except BaseException:
            return _RAW
        return 0

    return act
