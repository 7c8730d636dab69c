"""Evaluation of a model given by name in a separate process.

The caller writes one line of JSON to the stdin of the worker and keeps it open. The worker writes lines of JSON:
{"progress": [done, total]}, and at the end {"error": [class, text, attributes]} or {"done": true}. When its stdin
closes, the evaluation ends as after Ctrl-C. Nothing is pickled, and answers are in the run directory.
"""

from __future__ import annotations

import atexit
import codecs
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch

from mixlens import errors
from mixlens.errors import BadInput, RunError

_LOADING = ("device_map", "dtype", "revision", "experts", "quantization")
# Time for the worker to finish the current forward when asked to end.
_GRACE_S = 10.0


def evaluate_apart(model: str, job: Any, out: str | os.PathLike[str] | None, settings: Any) -> Any:
    """Evaluate the model with this name in another process.

    Return the Log opened from `out`; if `out` is None, from a temporary folder that is kept as long as this process.
    Raises the error of the evaluation, or RunError if the process ends without one.
    """
    from mixlens.evals.log import Log

    place = tempfile.mkdtemp(prefix="mixlens-eval-") if out is None else os.fspath(out)
    if out is None:
        atexit.register(shutil.rmtree, place, ignore_errors=True)  # routing is read from there on demand
    asked = _asked(model, job, place, settings)
    ended = _follow(asked, settings.progress, shown=settings.progress is True or settings.verify_prompts)
    if "error" in ended:
        name, text, named = ended["error"]
        raise getattr(errors, name, RunError)(text, **named)
    log = Log.open(place)
    log.path = None if out is None else log.path
    return log


def _asked(model: str, job: Any, place: str, settings: Any) -> str:
    if unknown := sorted(set(settings.loading) - set(_LOADING)):
        raise BadInput(
            f"Cannot load {model} with {', '.join(unknown)}: a model given by name takes {', '.join(_LOADING)}. Leave "
            "the others out, or load it yourself: ml.load(...).",
            argument="loading",
            value=unknown,
        )
    if settings.tokenizer is not None and not isinstance(settings.tokenizer, str):
        raise BadInput(
            f"Cannot send a {type(settings.tokenizer).__name__} to the process that evaluates {model}. Pass the name "
            "or folder of the tokenizer, or load the model: ml.load(...).",
            argument="tokenizer",
            value=type(settings.tokenizer).__name__,
        )
    kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("progress", "loading")}
    values = {
        "model": model,
        "loading": dict(settings.loading),
        "verbose": settings.progress is True,
        "threads": torch.get_num_threads(),  # the last digits of sums on the CPU depend on it
        "job": job.__dict__,
        "out": place,
        "settings": kept,
    }
    return json.dumps(values, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Convert a value that JSON cannot represent for the other process."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item"):  # a number of numpy's
        return value.item()
    if type(value).__module__ == "torch":  # a dtype or a device
        return str(value).removeprefix("torch.")
    raise BadInput(
        f"Cannot send a {type(value).__name__} in the settings to the process of the evaluation. Pass plain values, or "
        "load the model yourself: ml.load(...).",
        argument="settings",
        value=type(value).__name__,
    )


def _follow(asked: str, progress: Any, *, shown: bool) -> dict[str, Any]:
    """Return the last event of the other process, which has always ended when this function does."""
    from mixlens.evals.progress import reporting

    process = subprocess.Popen(
        [sys.executable, "-m", "mixlens.evals.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches only the caller, which ends the worker
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said = bytearray()
    listener = threading.Thread(target=_listen, args=(process.stderr, said, shown), daemon=True)
    listener.start()
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(asked.encode())
            process.stdin.flush()
        with reporting(progress) as report:
            for line in process.stdout:
                if not line.endswith(b"\n"):
                    break  # the worker was killed while writing this line
                event = json.loads(line)
                if "progress" not in event:
                    return event
                report(*event["progress"])
        status = process.wait()
        listener.join(_GRACE_S)
        raise _ended(status, said.decode("utf-8", "replace"))
    finally:
        _end(process)


def _listen(stream: Any, said: bytearray, shown: bool) -> None:
    """Forward the stderr of the worker to this process if `shown`, and keep its end in `said`."""
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a part may end within a character
    with stream:
        while part := stream.read1(65_536):
            said[:] = (said + part)[-4000:]
            if shown:
                sys.stderr.write(text.decode(part))
                sys.stderr.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(BrokenPipeError):
        process.stdin.close()  # type: ignore[union-attr]
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def _ended(status: int, said: str) -> RunError:
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    memory = ", possibly because memory ran out" if status == -signal.SIGKILL else ""
    last = (said.strip().splitlines() or ["nothing"])[-1].strip()[:300]
    return RunError(
        f"The process of the evaluation ended {how}{memory}; its last message: {last}. Answers are kept if out= was "
        "given: run it again, with a smaller batch_size if memory ran out.",
        argument="own_process",
        value=status,
    )
