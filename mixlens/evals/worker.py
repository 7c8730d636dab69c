"""Worker process of `subprocess`, which reads the evaluation to run as one line of JSON from stdin."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from functools import partial
from typing import Any

import torch

from mixlens.errors import MixlensError, RunError
from mixlens.evals.lm_eval_grading import Job
from mixlens.evals.runner import EvalSettings, run
from mixlens.models.load import load


def _main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the events

    def tell(**event: Any) -> None:
        events.write(json.dumps(event, default=str) + "\n")
        events.flush()

    def end(**event: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
        tell(**event)

    asked = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_caller, daemon=True).start()
    try:
        _evaluate(asked, lambda done, total: tell(progress=[done, total]))
        end(done=True)
    except MixlensError as error:
        end(error=_told(error))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except Exception as error:
        traceback.print_exc()
        end(error=_told(_unforeseen(error)))


def _evaluate(asked: dict[str, Any], progress: Any) -> None:
    torch.set_num_threads(asked["threads"])
    settings = EvalSettings(progress=progress, **asked["settings"])
    model = partial(load, asked["model"], verbose=asked["verbose"], **asked["loading"])
    run(model, Job.of(asked["job"]), asked["out"], settings)


def _end_with_caller() -> None:
    os.read(0, 1)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _told(error: MixlensError) -> tuple[str, str, dict[str, Any]]:
    return type(error).__name__, str(error), {"argument": error.argument, "value": error.value}


def _unforeseen(error: Exception) -> RunError:
    return RunError(
        f"The process of the evaluation raised {type(error).__name__}: {str(error).strip()[:500]}. Answers are kept "
        "if out= was given. Evaluate a loaded model, ml.load(...), to see where it was raised.",
        argument="own_process",
        value=type(error).__name__,
    )


if __name__ == "__main__":
    _main()
