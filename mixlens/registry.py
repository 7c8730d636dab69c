"""open: the object that a run directory holds, whatever its kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import xarray as xr

from mixlens.bench.bench import Bench
from mixlens.core.run_dir import open_run
from mixlens.decisions.judgement import Judgement
from mixlens.errors import BadInput, RunError
from mixlens.evals.log import Log
from mixlens.stats.contributions import open_contributions
from mixlens.stats.impact import Impact
from mixlens.stats.importance import open_importance
from mixlens.stats.pareto import Pareto
from mixlens.stats.topk import open_topk
from mixlens.trace.trace import Trace

Run = Trace | Log | Bench | Impact | Pareto | Judgement | xr.Dataset

_KINDS: dict[str, Callable[..., Any]] = {
    "trace": Trace.open,
    "importance": open_importance,
    "contributions": open_contributions,
    "topk": open_topk,
    "bench": Bench.open,
    "eval": Log.open,
    "impact": Impact.open,
    "pareto": Pareto.open,
    "judgement": Judgement.open,
}


def open(path: str | os.PathLike[str], *, check: bool = True) -> Run:
    """Open the run in a folder, whatever its kind; large arrays are read lazily.

    Parameters
    ----------
    path : str or os.PathLike
        The folder.
    check : bool, optional
        Compare every file with its checksum when it is first read; False compares sizes only.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        If there is no run, when it is not finished, or is of a kind that this version does not know.
    BadInput
        For what is no path.

    Examples
    --------
    >>> path = trace.save(tmp / "opened").path
    >>> type(ml.open(path)).__name__
    'Trace'
    """
    if not isinstance(path, str | os.PathLike):
        raise BadInput(
            f"Cannot open a run: expected a path, got {type(path).__name__}. Pass the folder given as out=.",
            argument="path",
            value=path,
        )
    kind = open_run(path, check=check).kind
    if kind not in _KINDS:
        raise RunError(
            f"Cannot open the run at {path}: it is of kind {kind}, and this version of mixlens opens "
            f"{', '.join(_KINDS)}. Use the version that wrote it.",
            argument="kind",
            value=kind,
        )
    return _KINDS[kind](path, check=check)
