"""Open a run directory of any kind, or routing in a foreign format."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import xarray as xr
from pyarrow import ArrowException
from safetensors import SafetensorError

from mixlens.bench.bench import Bench
from mixlens.core.run_dir import open_run
from mixlens.core.size_limits import Oversized
from mixlens.decisions.training import open_health
from mixlens.errors import BadInput, RunError, SourceError
from mixlens.evals.log import Log
from mixlens.stats.contributions import open_contributions
from mixlens.stats.impact import Impact
from mixlens.stats.importance import open_importance
from mixlens.stats.judgement import Judgement
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
    "training": open_health,
}


def open(path: str | os.PathLike[str], *, format: str | None = None, check: bool = True, **known: Any) -> Run:
    """Open a run of any kind, or routing in a foreign format; large arrays are read lazily.

    Parameters
    ----------
    path : str or os.PathLike
        The folder; "hf://owner/name" for a run uploaded by `push`, with "@revision" for a revision other than the
        newest commit; or any address that fsspec knows, such as "s3://bucket/run". Remote files are fetched when they
        are first used. For a foreign format, its file or folder.
    format : str, optional
        "flame" (FLAME-MoE-Traces, also at ``hf://datasets/...``), "vllm" or "sglang" (answers, one per line),
        "routed_experts" (the input of trainers that replay routing), "npy", "safetensors" or "parquet". None for a run
        of mixlens.
    check : bool, optional
        Verify the checksum of each file when it is first read; False verifies sizes only.
    **known : Any
        Facts that the format leaves out: ``model`` for answers; ``n_experts``, ``layers`` and ``tokens_a_sequence`` for
        arrays; ``iteration`` and ``tokens_a_sequence`` for FLAME-MoE. ``Trace.meta["not_known"]`` lists what remains
        unknown. If documents are not known, there are no intervals, except with ``cluster="window"``.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        If there is no run, it is not finished, or this version does not know its kind.
    BadInput
        If `path` is not a path, the format is unknown, or an argument does not apply to it.
    SourceError
        If a file does not hold routing; `argument` names the fault.

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
    if format is not None:
        return _open_format(path, format, known)
    if known:
        raise BadInput(
            f"Cannot open {path} with {', '.join(known)}: runs of mixlens need no such arguments. Leave them out, or "
            "pass format=.",
            argument=next(iter(known)),
            value=str(path),
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


def _open_format(path: str | os.PathLike[str], format: str, known: dict[str, Any]) -> Trace:
    from mixlens.engines.formats import FORMATS, open_replies  # torch takes seconds to import

    if format not in FORMATS:
        raise BadInput(
            f"Cannot open {path} as {format!r}: the formats are {', '.join(FORMATS)}. Pass one of them, or convert "
            "it to arrays for ml.Trace.from_arrays.",
            argument="format",
            value=format,
        )
    reader = FORMATS[format]
    takes = [name for name in inspect.signature(reader).parameters if name != "path"]
    if unknown := [name for name in known if name not in takes]:
        raise BadInput(
            f"Cannot open {path} as {format} with {unknown[0]}=: this format takes {', '.join(takes)}.",
            argument=unknown[0],
            value=format,
        )
    if reader is open_replies and "model" not in known:
        raise BadInput(
            f"Cannot open {path} as {format}: answers do not say how many experts the model has. Pass model=, its name "
            "or folder.",
            argument="model",
            value=format,
        )
    place = os.fspath(path)
    if "://" not in place and not os.path.exists(place):
        raise BadInput(f"Cannot open {place}: it does not exist. Check the path.", argument="path", value=place)
    try:
        return reader(place, **known)
    except (Oversized, OSError, ArrowException, SafetensorError) as error:
        raise SourceError(
            f"Cannot open {place} as {format}: {str(error).strip()[:300]}. Check the file and its format.",
            argument="path",
            value=place,
        ) from error
