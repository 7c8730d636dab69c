"""Driver inside the sandbox: drop privileges, set limits, run the program, and report its outcome.

This source is passed to `python -c` and cannot import mixlens, which does not exist inside the sandbox.
"""

import json
import os
import resource
import sys


def main() -> None:
    report = int(sys.argv[1])
    plan = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.buffer.read()
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)  # else the program could read the plan from its file
    os.close(nothing)
    if plan["uid"]:
        os.setgid(plan["uid"])
        os.setuid(plan["uid"])
    cpu_s = max(1, round(plan["seconds"] + 0.5))
    for name, limit in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, plan["memory_bytes"]),
        (resource.RLIMIT_FSIZE, plan["scratch_bytes"]),
        (resource.RLIMIT_NPROC, plan["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (limit, limit))
    os.write(report, b"ready\n")
    own = os.getpid()
    sys.argv = ["program", *map(str, plan["channel"])]
    outcome, error = run(program)
    if os.getpid() != own:  # this is a fork of the program
        os._exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, (plan["token"] + json.dumps([outcome, error]) + "\n").encode())
    os._exit(0)  # threads that the program left behind are not waited for


def run(program: bytes) -> "tuple[str, str]":
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit:
        return "exited", "SystemExit"
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {error}"[:2000]
    return "completed", ""


if __name__ == "__main__":
    main()
