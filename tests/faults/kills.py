"""Kill a process before every operation on a disk, and at random points, and let the same call go on from there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from verbs import VERBS, contents

# What Python tells an audit hook of, where it changes a disk.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Layer:
    """The files under a folder: counts every operation that changes them, and kills the process before one of them.

    A write is two operations: half of its bytes, and the rest.

    refusal  number of an error that this operation and all after it raise, instead of the kill
    """

    def __init__(self, folder: Path, fatal: int, refusal: int | None = None) -> None:
        self.folder, self.fatal, self.refusal, self.count = str(folder), fatal, refusal, 0
        self._fsync, self._write = os.fsync, Path.write_bytes
        os.fsync, Path.write_bytes = self.fsync, lambda path, data: self.write(path, data)  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def operation(self) -> None:
        if self.count >= self.fatal:
            if self.refusal is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.refusal, os.strerror(self.refusal or 0))
        self.count += 1

    def audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if changes and self._ours(path):
                self.operation()
        elif event in _CHANGES and (self._ours(arguments[0]) or arguments[1:2] not in ((), (-1,))):
            self.operation()  # named by its path, or within a folder that is open, as rmtree does

    def _ours(self, path: object) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.folder)

    def fsync(self, file: int) -> None:
        self.operation()
        self._fsync(file)

    def write(self, path: Path, data: bytes) -> int:
        if str(path).startswith(self.folder):
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                self.operation()
                file.write(data[len(data) // 2 :])
            return len(data)
        return self._write(path, data)


def in_child(act: Callable[[], int]) -> tuple[int, int]:
    """(signal that ended a forked process, what `act` gave or 255 where it raised)."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            status = act()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, os.WEXITSTATUS(status)


def again(verb: str, out: Path, whole: dict) -> str | None:
    """Call the verb once more in a folder that it was killed in; what is wrong then, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            VERBS[verb](out)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    found = contents(out)
    if found.keys() != whole.keys():
        return f"left over or missing: {sorted(found.keys() ^ whole.keys())}"
    different = [name for name in whole if found[name] != whole[name]]
    return f"different: {different}" if different else None


def undisturbed(verb: str, folder: Path) -> dict:
    VERBS[verb](folder / "whole")
    return contents(folder / "whole")


def at_every_operation(verb: str, folder: Path, every: int = 1, start: int = 0) -> Iterator[tuple[int, str | None]]:
    """(number of the operation before which it was killed, what was wrong afterwards), until it is not killed."""
    whole = undisturbed(verb, folder)
    fatal = start
    while True:
        out = folder / "killed"

        def act(out: Path = out, fatal: int = fatal) -> int:
            Layer(out, fatal)
            VERBS[verb](out)
            return 0

        ended, status = in_child(act)
        if not ended:
            if status:
                yield fatal, "the undisturbed call failed"
            return
        yield fatal, again(verb, out, whole)
        shutil.rmtree(out)
        fatal += every


def at_random(verb: str, folder: Path, n: int, seed: int) -> Iterator[tuple[int, str | None]]:
    """(microseconds after which it was killed, what was wrong afterwards); kills that came too late are tried again."""
    whole = undisturbed(verb, folder)
    draw = random.Random(f"{verb} {seed}")
    began = time.perf_counter()
    in_child(lambda: VERBS[verb](folder / "timed") or 0)
    takes = time.perf_counter() - began
    done = 0
    while done < n:
        out, after = folder / "killed", draw.uniform(0, takes)
        pid = os.fork()
        if pid == 0:
            try:
                with open(os.devnull, "w") as nothing:
                    os.dup2(nothing.fileno(), 1)
                    os.dup2(nothing.fileno(), 2)
                VERBS[verb](out)
            finally:
                os._exit(0)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            done += 1
            yield int(after * 1e6), again(verb, out, whole)
        shutil.rmtree(out, ignore_errors=True)
