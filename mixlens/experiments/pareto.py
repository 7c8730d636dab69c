"""measure_pareto: quality, bytes and speed of one model in several quantization schemes, in one run."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
import xarray as xr

from mixlens.bench.local_loads import LocalSettings
from mixlens.bench.prompts import Workload
from mixlens.bench.run import benchmark
from mixlens.core.files import SCARCE, shortages
from mixlens.core.run_dir import META, RunWriter, now, open_run, versions
from mixlens.errors import BadInput
from mixlens.experiments.impact import SETTINGS, measure_impact
from mixlens.models.load import load
from mixlens.models.provenance import audit, identity
from mixlens.models.quantization.checkpoint import skeleton_of
from mixlens.models.quantization.linears import require
from mixlens.plot.comparison import pareto as draw
from mixlens.plot.style import own_figure
from mixlens.recording.corpus import Corpus, RecordSettings
from mixlens.recording.documents import Documents
from mixlens.recording.recorder import PACKAGES
from mixlens.stats.impact import Impact
from mixlens.stats.pareto import COLUMNS, KIND, TABLE, Pareto
from mixlens.trace.shards import parquet_bytes

Scheme = str | Mapping[str, str]
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Speed:
    """Settings of the speed measurement: calls of generate with one prompt each; 0 calls skip it.

    Parameters
    ----------
    calls : int, optional
        Number of timed calls.
    prompt_tokens : int, optional
        Tokens per prompt.
    output_tokens : int, optional
        Tokens generated per call.

    Examples
    --------
    >>> ml.experiments.Speed(calls=0).calls
    0
    """

    calls: int = 8
    prompt_tokens: int = 64
    output_tokens: int = 32


def measure_pareto(
    model: str | os.PathLike[str],
    documents: Iterable[Any],
    *,
    schemes: Sequence[Scheme],
    out: str | os.PathLike[str],
    loading: Mapping[str, Any] = {},
    speed: Speed = Speed(),
    settings: RecordSettings = SETTINGS,
) -> Pareto:
    """Measure quality, bytes and speed of a model in several quantization schemes and unquantized.

    The original stays loaded next to one scheme at a time.

    Parameters
    ----------
    model : str or os.PathLike
        As for load.
    documents : Iterable[Any]
        Documents on which measure_impact measures quality, as for record.
    schemes : Sequence[Scheme]
        Schemes as in load (names or mappings), or a dtype such as "bfloat16".
    out : str or os.PathLike
        Run directory: table.parquet, pareto.png and pareto.pdf, and a folder per scheme with its impact and its
        benchmark, each a run. A stopped or killed run resumes at the scheme where it stopped.
    loading : Mapping[str, Any], optional
        Further arguments of load, such as device_map, dtype and revision.
    speed : Speed, optional
        Settings of the speed measurement.
    settings : RecordSettings, optional
        Settings for reading the documents.

    Returns
    -------
    Pareto

    Raises
    ------
    BadInput
        If there is no scheme, one is unknown or repeated, or equals that of the original.
    ModelError
        If a scheme cannot run on this machine, before anything is measured; and as load, measure_impact and benchmark.

    Examples
    --------
    >>> found = ml.experiments.measure_pareto(
    ...     "demo", documents, schemes=["nf4"], out="runs/schemes"
    ... )  # doctest: +SKIP
    """
    if isinstance(schemes, str) or not isinstance(schemes, Sequence):
        raise BadInput(
            f'Cannot compare the schemes {schemes!r}: expected a list. Pass one such as ["bfloat16", "nf4"].',
            argument="schemes",
            value=schemes,
        )
    names = [_name(scheme) for scheme in schemes]
    if not names or len(set(names)) != len(names):
        raise BadInput(
            f"Cannot compare the schemes {', '.join(names) or '(none)'}: none is given, or one twice. Pass each once.",
            argument="schemes",
            value=names,
        )
    documents = Documents(documents, settings.text)
    with shortages(Path(out), SCARCE):
        original = load(model, verbose=False, **loading)
    described = identity(original)
    first = described["audit"]["label"]
    if first in names:
        raise BadInput(
            f"Cannot compare {first} with the original: the original is already in {first}. Leave it out.",
            argument="schemes",
            value=first,
        )
    devices = {parameter.device for parameter in original.parameters()}
    for scheme in schemes:
        if scheme not in _DTYPES:
            skeleton = skeleton_of(deepcopy(original.config), scheme, original.dtype)
            for held in set(skeleton.schemes.values()):
                require(held, devices)
    corpus = Corpus.of(original, documents, None, settings)
    plan = {**corpus.plan(), "model": described, "schemes": names, "speed": vars(speed)}
    with RunWriter(out, KIND, plan) as writer:
        if not writer.complete:
            bench = _Sides(original, model, documents, loading, speed, settings, writer)
            for index, (name, scheme) in enumerate(zip([first, *names], [None, *schemes], strict=True)):
                if not writer.has(index):
                    rows, held = bench.measure(index, name, scheme)
                    rows = [{key: _finite(value) for key, value in row.items()} for row in rows]
                    writer.commit_shard(index, {}, {"rows": rows, "scheme": name, "model": held})
            _finish(writer, {"created": now(), "model": described, "documents": corpus.documents.count})
    return Pareto.open(out)


def _finite(value: Any) -> Any:
    """Convert a number to JSON: "inf" for an infinite bound, None for a missing one."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


@dataclass(frozen=True)
class _Sides:
    """The original model, and everything needed to measure a scheme next to it."""

    original: Any
    model: str | os.PathLike[str]
    documents: Documents
    loading: Mapping[str, Any]
    speed: Speed
    settings: RecordSettings
    writer: RunWriter

    def measure(self, index: int, name: str, scheme: Scheme | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Measure one scheme, or the original; return rows of the table and the metadata of the model.

        The quality of the original is measured with the first scheme.
        """
        folder = self.writer.path / f"{index:02d}-{''.join(c if c.isalnum() else '-' for c in name)}"
        folder.mkdir(exist_ok=True)
        loaded = self.original if scheme is None else self._load(scheme)
        audited, held = audit(loaded), identity(loaded)
        rows = [
            _counted(name, "bytes", audited.bytes, "bytes"),
            _counted(name, "expert_bits", audited.of("experts")["bits_per_weight"], "bits"),
        ]
        if scheme is not None:
            found = measure_impact(self.original, loaded, self.documents, out=folder / "impact", settings=self.settings)
            rows += _quality(name, found)
            if index == 1:
                rows += _quality_of_original(self.original, found)
        if self.speed.calls:
            rows += self._speed(name, loaded, folder / "speed")
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return rows, held

    def _load(self, scheme: Scheme) -> Any:
        options = dict(self.loading)
        if isinstance(scheme, str) and scheme in _DTYPES:
            return load(self.model, verbose=False, **options | {"dtype": scheme})
        return load(self.model, verbose=False, quantization=scheme, **options)

    def _speed(self, name: str, loaded: Any, folder: Path) -> list[dict[str, Any]]:
        workload = Workload(self.speed.prompt_tokens, self.speed.output_tokens)
        settings = LocalSettings(compiled=False, recording=False, progress=False)
        bench = benchmark(loaded, requests=self.speed.calls, out=folder, workload=workload, settings=settings)
        table = bench.table()
        median = table[(table["statistic"] == "p50") & table["metric"].isin(["ttft_s", "tpot_s"])]
        return [
            {"scheme": name, "quantity": row["metric"], "unit": "seconds"}
            | {key: row[key] for key in ("estimate", "ci_low", "ci_high", "n")}
            for row in median.to_dict("records")
        ]


def _quality(name: str, found: Impact) -> list[dict[str, Any]]:
    quality, split = found.quality(), found.split()
    cells = {
        "perplexity": (quality.sel(measure="perplexity_b"), ""),
        "loss_difference": (quality.sel(measure="loss_difference"), "nats"),
        "kl": (quality.sel(measure="kl"), "nats"),
        "kl_from_routing": (split.sel(quantity="kl", order="mean", part="routing"), "nats"),
        "same_top": (quality.sel(measure="same_top"), "fraction"),
        "overlap": (found.routing(pooled=True).sel(measure="overlap"), "fraction"),
    }
    return [_estimated(name, quantity, cell, unit) for quantity, (cell, unit) in cells.items()]


def _quality_of_original(original: Any, found: Impact) -> list[dict[str, Any]]:
    """Return the perplexity of the original and its exact values, since it agrees with itself."""
    name, cell = audit(original).label, found.quality().sel(measure="perplexity_a")
    exact = {"loss_difference": 0.0, "kl": 0.0, "kl_from_routing": 0.0, "same_top": 1.0, "overlap": 1.0}
    n = {"n": int(cell.n)}
    return [
        _estimated(name, "perplexity", cell, ""),
        *(
            _counted(name, quantity, value, "nats" if value == 0 else "fraction") | n
            for quantity, value in exact.items()
        ),
    ]


def _estimated(name: str, quantity: str, cell: xr.Dataset, unit: str) -> dict[str, Any]:
    numbers = {key: float(cell[key]) for key in ("estimate", "ci_low", "ci_high")}
    return {"scheme": name, "quantity": quantity, **numbers, "unit": unit, "n": int(cell.n)}


def _counted(name: str, quantity: str, value: float, unit: str) -> dict[str, Any]:
    return {"scheme": name, "quantity": quantity, "estimate": float(value), "unit": unit, "n": 1}


def _name(scheme: Scheme) -> str:
    return scheme if isinstance(scheme, str) else ",".join(f"{part}={held}" for part, held in scheme.items())


def _finish(writer: RunWriter, meta: dict[str, Any]) -> None:
    rows = [row for record in writer.done.values() for row in record["rows"]]
    table = pd.DataFrame(rows, columns=COLUMNS)
    order = {scheme: place for place, scheme in enumerate(table["scheme"].unique())}
    table = table.sort_values("scheme", key=lambda column: column.map(order), kind="stable", ignore_index=True)
    table = table.astype(dict.fromkeys(("estimate", "ci_low", "ci_high"), float))
    runs = sorted(found.parent for found in writer.path.glob(f"*/*/{META}"))
    speeds = [open_run(run, check=False) for run in runs if run.name == "speed"]
    machines = {run.meta["machine"]["name"] for run in speeds}
    schemes = {record["scheme"]: record["model"] for record in writer.done.values()}
    meta = {**meta, "schemes": schemes, "machine": " and ".join(sorted(machines)), "versions": versions(*PACKAGES)}
    figure = own_figure(draw(Pareto(table, meta)))
    files = {
        TABLE: parquet_bytes(pa.Table.from_pandas(table, preserve_index=False)),
        "pareto.png": figure.png(),
        "pareto.pdf": figure.pdf(),
    }
    writer.finish(meta, files, runs=runs)
