"""Run directories with recordings of one text at several training steps."""

from __future__ import annotations

import os

from mixlens.core.run_dir import open_run
from mixlens.trace.trace import Trace

KIND = "training"


def open_checkpoints(path: str | os.PathLike[str], *, check: bool = True) -> dict[int, Trace]:
    """Return the recordings in a folder by training step.

    Raises RunError if the run is missing, unfinished, altered, or of another kind.
    """
    run = open_run(path, KIND, check=check)
    return {step: Trace.open(run.path / folder_of(step), check=check) for step in run.meta["steps"]}


def folder_of(step: int) -> str:
    return f"step-{step:08d}"
