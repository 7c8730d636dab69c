"""Sandbox for model-written code, without network or files of the user, with limits, and judged from outside.

run_code   runs a program and returns its outcome
run_check  runs an answer in one process and its tests in another, so that the answer cannot read or forge the verdict
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from mixlens.errors import SandboxError
from mixlens.evals.seccomp import seccomp_filter

_DRIVER, _PLAIN, _ANSWER, _JUDGE = (
    Path(__file__).with_name(f"sandbox_{part}.py").read_text("utf-8") for part in ("driver", "plain", "answer", "judge")
)
_SCRATCH = "/scratch"
_STOPPED = ("timeout", "memory", "output")
_STARTUP_S, _CHECK_EVERY_S, _LAST_WORDS_S = 60.0, 0.05, 1.0
_INODE_BYTES = 1 << 10
# Read-only system paths with the libraries of the interpreter; not /etc, /home, /tmp, /var or /run.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
_KEYS = ("/proc/keys", "/proc/key-users")  # kernel keys of the caller; seccomp refuses the calls that use them
_NAMESPACES = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    seconds         wall-clock time from its first line, and CPU time of each process
    memory_bytes    address space of each process, and total resident memory of all processes and their files
    scratch_bytes   total size of its folder and temporary files, which are in memory
    output_bytes    total output of both streams; a program that prints more is stopped
    processes       concurrent processes and threads
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    scratch_bytes: int = 16 << 20
    output_bytes: int = 1 << 16
    processes: int = 16


@dataclass(frozen=True)
class CodeResult:
    """Outcome of a program, or of the check of an answer.

    outcome  "completed": the last line was reached; "raised": an exception, named in `error`; "exited": ended before
             the last line (exit(), a signal); "timeout", "memory", "output": stopped at this limit; "not plain": the
             answer returned, or the tests passed, a value that cannot cross between processes, named in `error`
    """

    outcome: str
    error: str
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.outcome == "completed"


@dataclass(frozen=True)
class Check:
    """An answer and its tests.

    answer   Python source written by a model
    tests    Python source that raises unless the answer is right
    names    names that the tests take from the answer, such as ("add",); all others are their own
    helpers  source that the tests need, run before them in the same process
    """

    answer: str
    tests: str
    names: tuple[str, ...]
    helpers: str = ""


def run_code(program: str, *, limits: Limits = Limits(), unsafe_without_sandbox: bool = False) -> CodeResult:
    """Run `program`, Python source, in a sandbox.

    The program has no network, an empty environment, a scratch folder in memory, read-only system libraries, and only
    the standard library. Its process namespace ends with it, so that no child process outlives it. An early exit() is
    not a pass. A malicious program could forge its own report; `run_check` judges from outside.

    unsafe_without_sandbox  run without bubblewrap, with limits on each process but with access to the network and to
                            every file of this user. Only for code that you have read.

    Raises SandboxError if this machine has no sandbox.
    """
    with _Program(program, limits, unsafe_without_sandbox) as running:
        running.watch.follow()
    return running.result()


def run_check(check: Check, *, limits: Limits = Limits(), unsafe_without_sandbox: bool = False) -> CodeResult:
    """Run the tests in one sandbox and the answer in another; calls, arguments and results cross as plain data.

    The process of the tests rebuilds numbers, strings and containers as values of built-in types. Changes of the answer
    to comparisons, built-in functions or modules therefore have no effect on the tests, and expected values stay hidden
    from the answer. A result of another type supports calls, iteration, len and attributes, but never comparison.

    `limits` apply to each process. stdout and stderr are those of the answer. Raises as run_code.
    """
    ours, theirs = socket.socketpair()
    plan = {"answer": check.answer, "tests": check.tests, "names": check.names, "helpers": check.helpers}
    with ours, theirs:
        judge = _Program(f"PLAN = {plan!a}\n{_PLAIN}\n{_JUDGE}", limits, unsafe_without_sandbox, ours)
        judged = _Program(f"{_PLAIN}\n{_ANSWER}", limits, unsafe_without_sandbox, theirs)
        with judged, judge:
            ours.close()
            theirs.close()
            answering = threading.Thread(target=judged.follow_to_its_end)
            answering.start()
            judge.follow_to_its_end()
            answering.join(_LAST_WORDS_S)  # it ends because the judge has closed the channel
            judged.watch.kill()
            answering.join()
    verdict, answer = judge.result(), judged.result()
    outcome, error = verdict.outcome, verdict.error
    name, _, text = error.partition(": ")
    stopped = answer.outcome if answer.outcome in _STOPPED else ""  # other reports of the answer are not trusted
    if name == "NotPlain":
        outcome, error = "not plain", text
    elif name == "TooMuch":
        outcome, error = "output", ""
    elif name == "Gone":
        outcome, error = stopped or "exited", ""
    elif stopped and not verdict.passed:
        outcome, error = stopped, ""
    return CodeResult(outcome, error, answer.stdout, answer.stderr, verdict.seconds)


def run_checks(checks: Sequence[Check], *, limits: Limits = Limits(), workers: int | None = None) -> list[CodeResult]:
    """Run run_check for each check with `workers` threads, by default one per core."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        run = [pool.submit(run_check, check, limits=limits) for check in checks]
        try:
            return [future.result() for future in run]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # else the rest would still run after Ctrl-C


def check_sandbox() -> None:
    """Raise SandboxError if model-written code cannot be run on this machine."""
    run_code("pass")


class _Program:
    """A running program in a sandbox, from its start to the end of all its processes."""

    def __init__(
        self, program: str, limits: Limits, unsafe_without_sandbox: bool, channel: socket.socket | None = None
    ) -> None:
        bound = 0 if unsafe_without_sandbox or os.getuid() else secrets.randbelow(500) + 65_000
        self.token = secrets.token_hex(16)
        self.folder = tempfile.TemporaryDirectory() if unsafe_without_sandbox else None
        passed = [] if channel is None else [channel.fileno()]
        plan = {**asdict(limits), "token": self.token, "uid": bound, "channel": passed}
        if unsafe_without_sandbox:  # without a namespace the limit counts all processes of this user
            plan["processes"] += _threads_of_this_user()
        report, report_end = os.pipe()
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as calls:
            source.write(json.dumps(plan).encode() + b"\n" + program.encode("utf-8", "surrogateescape"))
            source.seek(0)
            python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", _DRIVER, str(report_end)]
            if self.folder is not None:
                folder = self.folder.name
                command, env = python, {"HOME": folder, "TMPDIR": folder}
            else:
                calls.write(_refused_calls())
                calls.seek(0)
                command, env, folder = [*_bubblewrap(limits, calls.fileno()), *python], {}, "/"
                passed = [*passed, calls.fileno()]
            try:
                process = subprocess.Popen(
                    command,
                    stdin=source,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[report_end, *passed],
                    env=env,
                    cwd=folder,
                    start_new_session=True,
                )
            finally:
                os.close(report_end)
        self.watch = _Watch(process, report, limits)

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.end()
        if self.folder is not None:
            self.folder.cleanup()

    def follow_to_its_end(self) -> None:
        """Follow the program to its end, then kill its processes, so that the other side stops waiting."""
        try:
            self.watch.follow()
        finally:
            self.watch.kill()

    def result(self) -> CodeResult:
        return _result(self.watch, self.token)


def _refused_calls() -> bytes:
    refused = seccomp_filter()
    if refused is None:
        raise _no_sandbox(f"its system calls are not known for the processor {platform.machine()}")
    return refused


def _bubblewrap(limits: Limits, refused_calls: int) -> list[str]:
    """Return the bwrap command to put before python, with only the scratch folder writable."""
    found = shutil.which("bwrap")
    if found is None:
        raise _no_sandbox("bubblewrap (bwrap) is not installed")
    home = os.path.realpath(sys.base_prefix)
    mounts = [part for path in _SYSTEM if Path(path).exists() for part in ("--ro-bind", path, path)]
    if not home.startswith("/usr"):
        above = [str(folder) for folder in reversed(Path(home).parents)][1:]  # else closed to all but root
        mounts += [part for folder in above for part in ("--perms", "0755", "--dir", folder)]
        mounts += ["--ro-bind", home, home]
    # Process limits do not apply to root, so root drops its privileges inside and takes another user id.
    rights = (
        ["--unshare-user", "--disable-userns"]
        if os.getuid()
        else ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    )
    scratch = ["--perms", "1777", "--size", str(limits.scratch_bytes), "--tmpfs", _SCRATCH]
    no_keys = [part for path in _KEYS if Path(path).exists() for part in ("--ro-bind", "/dev/null", path)]
    closed = ["--remount-ro", "/dev", "--remount-ro", "/"]
    variables = {"HOME": _SCRATCH, "TMPDIR": _SCRATCH, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    return [
        found, *_NAMESPACES, *rights, "--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv",
        "--seccomp", str(refused_calls),
        *(part for name, value in variables.items() for part in ("--setenv", name, value)),
        *mounts, "--proc", "/proc", *no_keys, "--dev", "/dev", *scratch, *closed, "--chdir", _SCRATCH, "--",
    ]  # fmt: skip


@dataclass
class _Watch:
    """Reader of the output and report of a running program, which stops it at a limit."""

    process: subprocess.Popen[bytes]
    report_fd: int
    limits: Limits
    stopped: str = ""
    started: float = 0.0
    seconds: float = 0.0
    texts: dict[str, bytearray] = field(
        default_factory=lambda: {k: bytearray() for k in ("stdout", "stderr", "report")}
    )

    def follow(self) -> None:
        """Read until the program ends, or reaches a limit."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        begun = time.monotonic()
        with selectors.DefaultSelector() as streams:
            for name, stream in (("stdout", self.process.stdout), ("stderr", self.process.stderr)):
                streams.register(stream.fileno(), selectors.EVENT_READ, name)
            streams.register(self.report_fd, selectors.EVENT_READ, "report")
            while streams.get_map() and not self.stopped:
                for key, _ in streams.select(_CHECK_EVERY_S):
                    if not self._read(key.fd, key.data):
                        streams.unregister(key.fd)
                now = time.monotonic()
                if not self.started and self.texts["report"]:
                    self.started = now
                if self.process.poll() is not None:
                    self._rest(list(streams.get_map().values()))
                    break
                self.stopped = self.stopped or self._limit_reached(now, begun)
            self.seconds = time.monotonic() - (self.started or begun)

    def kill(self) -> None:
        """Kill all remaining processes; the process namespace ends with its first process."""
        for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
            try:
                kill()
            except (ProcessLookupError, PermissionError):
                continue

    def end(self) -> None:
        self.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        os.close(self.report_fd)

    def _read(self, fd: int, name: str) -> bool:
        chunk = os.read(fd, 65_536)
        kept = self.texts[name]
        printed = len(self.texts["stdout"]) + len(self.texts["stderr"])
        room = self.limits.output_bytes - (printed if name != "report" else len(kept))
        kept += chunk[: max(room, 0)]
        if len(chunk) > room and name != "report":
            self.stopped = "output"
        return bool(chunk)

    def _rest(self, streams: list[selectors.SelectorKey]) -> None:
        """Read the rest of an ended program's pipes without blocking, as a stray process could hold them open."""
        for key in streams:
            os.set_blocking(key.fd, False)
            try:
                while not self.stopped and self._read(key.fd, key.data):
                    pass
            except BlockingIOError:
                continue

    def _limit_reached(self, now: float, begun: float) -> str:
        if self.started and now - self.started > self.limits.seconds:
            return "timeout"
        if not self.started and now - begun > _STARTUP_S:
            return "startup"
        return "memory" if _held_bytes(self.process.pid) > self.limits.memory_bytes else ""


def _held_bytes(pid: int) -> int:
    """Return the memory of a sandbox: resident memory of its processes, and its files, which are in memory."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = scratch = 0
    for process in family:
        try:
            total += process.memory_info().rss
            scratch = max(scratch, _files_bytes(Path(f"/proc/{process.pid}/root{_SCRATCH}")))
        except (psutil.Error, OSError):
            continue
    return total + scratch


def _files_bytes(folder: Path) -> int:
    """Return the memory of a tmpfs folder, including the kernel's overhead per file."""
    if not folder.is_mount():
        return 0
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize + (found.f_files - found.f_ffree) * _INODE_BYTES


def _threads_of_this_user() -> int:
    running = (p.info for p in psutil.process_iter(["uids", "num_threads"]))
    return sum(info["num_threads"] or 0 for info in running if info["uids"] and info["uids"].real == os.getuid())


def _result(watch: _Watch, token: str) -> CodeResult:
    shown = {name: bytes(watch.texts[name]).decode("utf-8", "replace") for name in ("stdout", "stderr", "report")}
    lines = shown["report"].splitlines()
    if not lines or lines[0] != "ready":
        said = shown["stderr"].strip().splitlines()[-1:] or [f"it ended with status {watch.process.returncode}"]
        raise _no_sandbox(f"bubblewrap could not start a program: {said[0]}")
    ended = next((json.loads(line.removeprefix(token)) for line in lines[1:] if line.startswith(token)), None)
    outcome, error = watch.stopped, ""
    if not outcome:
        cpu_used_up = watch.process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
        outcome, error = ended or ("timeout" if cpu_used_up else "exited", "")
    return CodeResult(outcome, error, shown["stdout"], shown["stderr"], watch.seconds)


def _no_sandbox(found: str) -> SandboxError:
    return SandboxError(
        f"Cannot run model-written code: there is no sandbox, because {found}. Install bubblewrap 0.8 or newer "
        "(Debian, Ubuntu: apt-get install bubblewrap) on a Linux that allows user namespaces, or pass "
        "unsafe_without_sandbox=True, which gives the code access to your network and your files.",
        argument="bwrap",
        value=found,
    )
