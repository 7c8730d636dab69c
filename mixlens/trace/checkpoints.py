"""Checkpoints: a run directory of recordings of one text, each made at a step of training."""

from __future__ import annotations

import os

from mixlens.core.run_dir import open_run
from mixlens.trace.trace import Trace

KIND = "training"


def open_checkpoints(path: str | os.PathLike[str], *, check: bool = True) -> dict[int, Trace]:
    """The recordings in a folder by their step.

    Raises RunError when the run is not there, unfinished, altered, or of another kind.
    """
    run = open_run(path, KIND, check=check)
    return {step: Trace.open(run.path / folder_of(step), check=check) for step in run.meta["steps"]}


def folder_of(step: int) -> str:
    return f"step-{step:08d}"
