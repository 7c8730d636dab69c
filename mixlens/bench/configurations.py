"""benchmark_configurations: one model in several dtypes, quantizations and experts implementations."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from mixlens.bench.bench import Bench
from mixlens.bench.local import Subject, failed, finished
from mixlens.bench.local_loads import Load, LocalSettings, check_calls, check_experts, loads_of, settings_plan
from mixlens.bench.prompts import Workload
from mixlens.bench.record_sink import Kept
from mixlens.core.run_dir import RunWriter, now
from mixlens.errors import BadInput
from mixlens.models.load import load

_WORKLOAD, _SETTINGS = Workload(), LocalSettings()


def benchmark_configurations(
    model: str | os.PathLike[str],
    configurations: Sequence[Mapping[str, Any]],
    *,
    concurrency: int | Sequence[int] | None = None,
    requests: int = 8,
    out: str | os.PathLike[str] | None = None,
    workload: Workload | Sequence[Workload] = _WORKLOAD,
    settings: LocalSettings = _SETTINGS,
) -> Bench:
    """Benchmark a model in several configurations, loaded and measured one after the other.

    The names of the loads include the configuration, such as "nf4: batch 1, 256 + 128 tokens". A configuration that
    cannot be loaded or run has the outcome "failed", with the reason in its record and in the remarks; the other
    configurations are still measured. `Bench.configurations()` returns one Bench per configuration.

    Parameters
    ----------
    model : str or os.PathLike
        Name or folder of the model, as for `ml.load`.
    configurations : Sequence[Mapping[str, Any]]
        Arguments of `ml.load` for each configuration, such as [{"dtype": "bfloat16"}, {"quantization": "nf4"}].
    concurrency : int or Sequence[int], optional
        Rows per batch, as in `ml.benchmark`.
    requests : int, optional
        Number of measured calls per load.
    out : str or os.PathLike, optional
        Run directory for all configurations; None keeps the records in memory.
    workload : Workload or Sequence[Workload], optional
        Prompts and lengths.
    settings : LocalSettings, optional
        Settings of the benchmark. Each configuration is measured with every implementation in `experts`, and
        `max_seconds` applies to each configuration separately.

    Returns
    -------
    Bench

    Raises
    ------
    BadInput
        If there are no configurations, one is repeated, or a load is invalid.

    Examples
    --------
    >>> dtypes = [{"dtype": "float32"}, {"dtype": "bfloat16"}]
    >>> bench = ml.bench.benchmark_configurations("demo", dtypes)  # doctest: +SKIP
    """
    labels = _labels(configurations)
    check_calls(requests, settings)
    loads_of(concurrency, workload, settings)
    plan = {
        "model": {"name": str(model)},
        "configurations": [{name: str(value) for name, value in one.items()} for one in configurations],
        "loads": [load.name for label in labels for load in loads_of(concurrency, workload, settings, label)],
        "requests": requests,
        "workloads": [one.plan() for one in ([workload] if isinstance(workload, Workload) else workload)],
        "settings": settings_plan(settings),
    }
    started, told, stopped = now(), {}, None
    with nullcontext() if out is None else RunWriter(out, "bench", plan) as writer:
        if writer is not None and writer.complete:
            return Bench.open(writer.path)
        with Kept(writer, len(plan["loads"]) * requests, show=settings.progress) as kept:
            for label, options in zip(labels, configurations, strict=True):
                loads = loads_of(concurrency, workload, settings, label)
                told[label], ended = _measured(model, options, loads, settings, requests, kept)
                stopped = ended or stopped
                gc.collect()
                if torch.accelerator.is_available():
                    torch.accelerator.empty_cache()
                if stopped == "an interrupt":
                    break
        meta = {"created": started, "model": {"name": str(model)}, "configurations": told, "stopped": stopped}
        return finished(kept, writer, meta)


def _measured(
    model: str | os.PathLike[str],
    options: Mapping[str, Any],
    loads: Sequence[Load],
    settings: LocalSettings,
    requests: int,
    kept: Kept,
) -> tuple[dict[str, Any], str | None]:
    """Measure one configuration; return its metadata and what stopped it. Failures are added to the records."""
    try:
        loaded = load(model, verbose=False, **options)
        fit = []
        for one in loads:
            try:
                check_experts(loaded, one.experts)
                fit.append(one)
            except BadInput as error:
                kept.keep(failed(one, error))
        return Subject(loaded, fit, settings, keep_failures=True).measure(requests, kept) if fit else ({}, None)
    except KeyboardInterrupt:
        return {}, "an interrupt"
    except Exception as error:  # a library may raise anything; the other configurations must still run
        begun = {record.level for record in kept.records}
        for one in loads:
            if one.name not in begun:
                kept.keep(failed(one, error))
        return {}, None


def _labels(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Label each configuration by the arguments that distinguish it from the others."""
    names = list(dict.fromkeys(name for one in configurations for name in one))
    alike = [name for name in names if len({str(one.get(name)) for one in configurations}) == 1]
    telling = [name for name in names if name not in alike] or names
    labels = [
        ", ".join(_words(one[name]) for name in telling if one.get(name) is not None) or "as it is"
        for one in configurations
    ]
    if not labels or len(set(labels)) < len(labels):
        raise BadInput(
            f"Cannot benchmark the configurations {', '.join(labels) or '(none)'}: the list is empty, or repeats one. "
            'Pass distinct ones, as in [{"dtype": "bfloat16"}, {"quantization": "nf4"}].',
            argument="configurations",
            value=labels,
        )
    return labels


def _words(value: Any) -> str:
    told = ",".join(f"{part}={scheme}" for part, scheme in value.items()) if isinstance(value, Mapping) else str(value)
    return told.removeprefix("torch.")
