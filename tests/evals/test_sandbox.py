"""The sandbox: what a program may do, and every way out of it that was tried."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from helpers.refusals import refused

from mixlens.errors import SandboxError
from mixlens.evals import sandbox
from mixlens.evals.sandbox import Check, Limits, check_sandbox, run_checks, run_code

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
# Generous: on a busy machine a program must fail by its own limit, not by the clock.
LIMITS = Limits(seconds=60)


def found(word: str) -> list[psutil.Process]:
    """Processes, of whatever namespace, that have `word` in their command line."""
    return [p for p in psutil.process_iter(["cmdline"]) if word in " ".join(p.info["cmdline"] or [])]


def running(word: str) -> list[int]:
    """Those that are not about to end."""
    psutil.wait_procs(found(word), timeout=20)  # killed, the kernel still needs a moment to take each away
    return [process.pid for process in found(word)]


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "outcome", "error"),
    [
        ("print('hello')", "completed", ""),
        ("import heapq, re, collections, threading\nassert __name__ == '__main__'", "completed", ""),
        ("assert 1 == 2", "raised", "AssertionError: "),
        ("def f(:", "raised", "SyntaxError"),
        ("import sys\nsys.exit(0)", "exited", "SystemExit"),
        ("import os\nos._exit(0)", "exited", ""),
        ("import os\nos.kill(os.getpid(), 9)", "exited", ""),
        ("import os\nif os.fork():\n    os.wait()\n    1 / 0", "raised", "ZeroDivisionError"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,)).start()", "completed", ""),
        ("open('mine.txt', 'w').write('x')\nassert open('mine.txt').read() == 'x'", "completed", ""),
        ("assert input() == ''", "raised", "EOFError"),
    ],
)
def test_how_a_program_ended_is_told(program, outcome, error):
    result = run_code(program, limits=LIMITS)
    assert (result.outcome, result.passed) == (outcome, outcome == "completed")
    assert result.error.startswith(error)


@needs_bubblewrap
def test_what_it_prints_is_kept():
    result = run_code("import sys\nprint('out é')\nprint('err', file=sys.stderr)", limits=LIMITS)
    assert (result.stdout, result.stderr) == ("out é\n", "err\n")


@needs_bubblewrap
def test_no_network_not_even_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "1.1.1.1"):
            result = run_code(f"import socket\nsocket.create_connection(({host!r}, {port}), 5)", limits=LIMITS)
            assert result.outcome == "raised"
            assert "Error" in result.error
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@needs_bubblewrap
def test_no_abstract_socket_of_this_machine():
    name = f"\0mixlens-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        program = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})"
        assert "ConnectionRefusedError" in run_code(program, limits=LIMITS).error


@needs_bubblewrap
def test_no_file_outside_is_read_or_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the key")
    seen = (
        str(secret),
        "/etc/passwd",
        "/etc/shadow",
        str(Path.home() / ".bashrc"),
        str(Path(__file__)),
        "/var/log",
        "/run",
        "/sys",
    )
    program = f"""
import os
for path in {seen!r}:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path).read()
    except OSError:
        continue
    raise SystemError(path)
kept = "/x /usr/x /usr/bin/x /etc/x /proc/sys/kernel/core_pattern /dev/shm/x /dev/x".split()
for path in (*kept, {str(tmp_path / "x")!r}):
    try:
        open(path, "w").write("x")
    except OSError:
        continue
    raise SystemError(path)
"""
    result = run_code(program, limits=LIMITS)
    assert (result.outcome, result.error) == ("completed", "")
    assert [p.name for p in tmp_path.iterdir()] == ["secret.txt"]


@needs_bubblewrap
def test_the_environment_and_its_keys_stay_outside(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    program = """
import glob, os
print(dict(os.environ))
for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):
    try:
        print(open(path, 'rb').read())
    except OSError:
        pass
"""
    result = run_code(program, limits=LIMITS)
    assert result.outcome == "completed"
    assert "hf_very_secret" not in result.stdout + result.stderr
    assert "HOME" in result.stdout


@needs_bubblewrap
def test_it_sees_no_process_of_this_machine_and_cannot_end_its_parents():
    program = f"""
import os
seen = [int(name) for name in os.listdir('/proc') if name.isdigit()]
assert len(seen) <= 3, seen
for pid in {{1, os.getppid(), {os.getpid()}}}:
    try:
        os.kill(pid, 9)
    except OSError:
        pass
assert os.getuid() != 0
print('still here')
"""
    result = run_code(program, limits=LIMITS)
    assert (result.outcome, result.stdout) == ("completed", "still here\n")


@needs_bubblewrap
def test_limits_and_rights_cannot_be_raised_again():
    program = """
import os, resource
for attempt in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.chroot('/'), lambda: os.nice(-5),
                lambda: resource.setrlimit(resource.RLIMIT_NPROC, (4000, 4000)),
                lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))):
    try:
        attempt()
    except (OSError, ValueError):
        continue
    raise SystemError('allowed')
"""
    assert run_code(program, limits=LIMITS).outcome == "completed"


@needs_bubblewrap
def test_a_fork_bomb_goes_out(monkeypatch):
    name = f"mixlensbomb{secrets.token_hex(6)}"
    monkeypatch.setattr(sandbox, "_DRIVER", f"{sandbox._DRIVER}\n# {name}")  # which every fork has in its command line
    bomb = "import os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.1)"
    assert run_code(bomb, limits=Limits(seconds=2)).outcome == "timeout"
    assert running(name) == []


@needs_bubblewrap
def test_no_more_processes_than_allowed():
    program = """
import os, time
children = 0
try:
    while children < 1000:
        if os.fork() == 0:
            time.sleep(1e6)
        children += 1
except BlockingIOError:
    print(children)
"""
    assert int(run_code(program, limits=Limits(seconds=60, processes=8)).stdout) < 8


@needs_bubblewrap
def test_memory_of_one_process_is_bounded():
    assert run_code("x = bytearray(4 << 30)", limits=LIMITS).outcome == "memory"


@needs_bubblewrap
def test_memory_of_all_processes_together_is_bounded():
    program = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        kept = b'x' * (100 << 20)
        time.sleep(1e6)
time.sleep(1e6)
"""
    assert run_code(program, limits=Limits(seconds=120, memory_bytes=256 << 20)).outcome == "memory"


@needs_bubblewrap
@pytest.mark.parametrize(
    "attempt",
    [
        "mmap.mmap(-1, 1 << 20)",
        "mmap.mmap(os.open('/dev/zero', os.O_RDWR), 1 << 20)",
        "os.memfd_create('x')",
        "checked(libc.syscall(VMSPLICE, os.pipe()[1], None, 0, 0))",
        "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)",
        "checked(libc.shmget(0, 1 << 20, 0o1600))",
        "checked(libc.msgget(0, 0o1600))",
        "checked(libc.semget(0, 1, 0o1600))",
        "checked(libc.syscall(KEYCTL, 1, None))",
        "checked(libc.unshare(0x10000000))",
        "checked(libc.syscall(CLONE, 0x10000000 | 17, None, None, None, None))",
        "checked(libc.syscall(435, b'\\0' * 88, 88))",
        "socket.socket(socket.AF_INET)",
        "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "socket.socket(40)",  # AF_VSOCK, to the hypervisor
        "time.clock_settime(time.CLOCK_REALTIME, time.time())",
        "open('/dev/shm/x', 'w')",
    ],
)
def test_no_shared_memory_no_keys_no_namespaces_no_other_sockets(attempt):
    program = f"""
import ctypes, mmap, os, platform, socket, time
libc = ctypes.CDLL(None, use_errno=True)
KEYCTL, CLONE, VMSPLICE = (250, 56, 278) if platform.machine() == 'x86_64' else (219, 220, 75)
def checked(value):
    if value == -1: raise OSError(ctypes.get_errno(), 'refused')
try:
    {attempt}
except OSError:
    raise SystemExit
"""
    assert run_code(program, limits=LIMITS).error == "SystemExit"


@needs_bubblewrap
def test_no_keys_are_listed_and_honest_pipes_and_maps_work():
    program = """
import mmap, multiprocessing.connection, socket
for path in ('/proc/keys', '/proc/key-users'):
    try:
        assert open(path).read() == ''
    except OSError:
        pass
a, b = multiprocessing.connection.Pipe()
a.send([1])
assert b.recv() == [1]
socket.socket(socket.AF_UNIX).setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
private = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private[:2] = b'ab'
"""
    assert run_code(program, limits=LIMITS).error == ""


@needs_bubblewrap
def test_many_empty_files_are_memory_too(monkeypatch):
    program = "import time\nfor i in range(1000): open(str(i), 'w').close()\ntime.sleep(1e6)"
    monkeypatch.setattr(sandbox, "_INODE_BYTES", 1 << 17)
    assert run_code(program, limits=Limits(seconds=60, memory_bytes=128 << 20)).outcome == "memory"


@needs_bubblewrap
def test_files_of_the_scratch_folder_are_bounded_and_gone_afterwards():
    program = "for i in range(10):\n    open(f'{i}', 'wb').write(b'x' * (4 << 20))"
    assert "OSError: [Errno 28]" in run_code(program, limits=LIMITS).error
    assert run_code("import os\nassert os.listdir('.') == []", limits=LIMITS).passed


@needs_bubblewrap
@pytest.mark.parametrize("loop", ["while True:\n    pass", "import time\ntime.sleep(1e6)"])
def test_an_endless_loop_is_stopped(loop):
    assert run_code(loop, limits=Limits(seconds=1)).outcome == "timeout"


@needs_bubblewrap
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_huge_output_is_cut(stream):
    program = f"import sys\nwhile True:\n    sys.{stream}.write('x' * 10_000)"
    result = run_code(program, limits=LIMITS)
    assert result.outcome == "output"
    assert len(result.stdout) + len(result.stderr) == LIMITS.output_bytes


@needs_bubblewrap
def test_a_program_cannot_fill_memory_through_its_report():
    program = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b'x' * (1 << 20))
    except OSError:
        pass
"""
    assert run_code(program, limits=LIMITS).outcome in ("completed", "exited")


@needs_bubblewrap
def test_a_daemon_does_not_outlive_the_program():
    name = f"mixlensdaemon{secrets.token_hex(6)}"
    program = f"""
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1e6)  # {name}'])
    os._exit(0)
while True:  # until the daemon is there
    for pid in filter(str.isdigit, os.listdir('/proc')):
        if {name!r}.encode() in open(f'/proc/{{pid}}/cmdline', 'rb').read() and int(pid) != os.getpid():
            print('started')
            raise SystemExit
"""
    result = run_code(program, limits=LIMITS)
    assert (result.outcome, result.stdout) == ("exited", "started\n")
    assert running(name) == []


@needs_bubblewrap
def test_nothing_is_left_when_the_caller_is_killed(tmp_path):
    name = f"mixlensorphan{secrets.token_hex(6)}"
    caller = f"""
from mixlens.evals import sandbox
sandbox._DRIVER += "\\n# {name}"
answer = "def f():\\n    while True: pass"
sandbox.run_check(sandbox.Check(answer, "f()", ("f",)), limits=sandbox.Limits(seconds=600))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", caller], env=environment, cwd=Path(__file__).parents[2])
    try:
        while len(found(name)) < 7:  # the caller, and for either side bubblewrap twice and Python
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert running(name) == []
    assert list(tmp_path.iterdir()) == []


@needs_bubblewrap
def test_many_at_a_time_in_order():
    results = run_checks([Check(f"print({i})", "pass", ()) for i in range(6)], limits=LIMITS, workers=3)
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(6)]


def test_no_sandbox_is_refused_and_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    program = f"open({str(tmp_path / 'ran')!r}, 'w')"
    with refused(SandboxError, "bwrap"):
        run_code(program)
    with refused(SandboxError, "bwrap"):
        check_sandbox()
    assert not (tmp_path / "ran").exists()


def test_a_sandbox_that_does_not_start_is_refused_and_nothing_is_run(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: str(broken))
    with refused(SandboxError, "bwrap") as caught:
        run_code("pass")
    assert "No permissions" in caught.value.value


def test_who_insists_gets_limits_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    said = run_code("import os\nprint(dict(os.environ), os.listdir('.'))", unsafe_without_sandbox=True)
    assert said.passed
    assert "hf_very_secret" not in said.stdout
    endless = run_code("while True:\n    pass", limits=Limits(seconds=1), unsafe_without_sandbox=True)
    assert endless.outcome == "timeout"
    assert run_code("x = bytearray(4 << 30)", unsafe_without_sandbox=True).outcome == "memory"


def test_what_stops_one_program_stops_those_that_wait(monkeypatch):
    begun: list[str] = []

    def run(check: Check, **_) -> None:
        begun.append(check.answer)
        subprocess.run(["true"])
        if check.answer == "0":
            raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "run_check", run)
    with pytest.raises(KeyboardInterrupt):
        run_checks([Check(str(n), "", ()) for n in range(2000)], workers=1)
    assert len(begun) < 2000


def test_who_insists_may_have_other_processes():
    """A limit on processes counts all of a user's, but for root, who has none."""
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(Limits().processes)]
    try:
        program = "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()"
        assert run_code(program, limits=LIMITS, unsafe_without_sandbox=True).passed
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_nothing_of_a_stopped_program_is_left_open():
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    before, threads = len(list(descriptors.iterdir())), threading.active_count()
    for program in ("pass", "1 / 0"):
        run_code(program, unsafe_without_sandbox=True)
    assert (len(list(descriptors.iterdir())), threading.active_count()) == (before, threads)
