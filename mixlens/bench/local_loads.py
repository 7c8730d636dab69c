"""Settings and loads for the benchmark of a loaded model, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from mixlens.bench.local_tables import in_configuration
from mixlens.bench.model_prompts import Prompts
from mixlens.bench.prompts import Workload
from mixlens.errors import BadInput
from mixlens.models.decoding import AUTO, register
from mixlens.models.layout import moe_layers
from mixlens.models.quantization.unfuse import is_unfused


@dataclass(frozen=True)
class LocalSettings:
    """Settings for the benchmark of a loaded model.

    Parameters
    ----------
    warmup : int, optional
        Number of warm-up calls before each load, which are recorded but not counted. The first is the cold call.
    experts : str or Sequence[str], optional
        Experts implementations to measure in turn, such as "eager" or "grouped_mm"; None for the model's own.
    static_cache : bool, optional
        Whether to preallocate the cache of keys and values for the longest sequence.
    compiled : bool, optional
        Whether to decode as in `ml.compiled_decoding`. None compiles if the rest of a load would otherwise take more
        than a minute, and keeps the faster way; the remarks of the result state the choice with both times.
    recording : bool, optional
        Whether to record routing in every call, which gives the bytes that the call must read.
    max_seconds : float, optional
        Time in seconds after which no call starts; None for no cap.
    progress : bool, optional
        Whether to show a progress bar.

    Examples
    --------
    >>> ml.bench.LocalSettings(warmup=0).recording
    True
    """

    warmup: int = 1
    experts: str | Sequence[str] | None = None
    static_cache: bool = False
    compiled: bool | None = None
    recording: bool = True
    max_seconds: float | None = 600.0
    progress: bool = True


@dataclass(frozen=True)
class Load:
    """A load: rows per batch, workload and experts implementation (None: the model's own).

    configuration  label of the configuration in which the model was loaded, if there are several
    """

    rows: int
    workload: Workload
    experts: str | None
    configuration: str = ""

    @property
    def name(self) -> str:
        prompt = str(self.workload.prompt_tokens) if self.workload.prompts is None else "given"
        experts = f", {self.experts}" if self.experts else ""
        load = f"batch {self.rows}, {prompt} + {self.workload.output_tokens} tokens{experts}"
        return in_configuration(self.configuration, load)


def settings_plan(settings: LocalSettings) -> dict[str, Any]:
    """Return the settings that determine a measurement, as plain values."""
    return {name: value for name, value in asdict(settings).items() if name != "progress"}


def check_calls(requests: int, settings: LocalSettings) -> None:
    """Raise BadInput for an invalid number of calls or seconds."""
    seconds = settings.max_seconds
    if (
        not isinstance(requests, int)
        or requests < 1
        or settings.warmup < 0
        or (seconds is not None and not seconds > 0)
    ):
        raise BadInput(
            f"Cannot benchmark {requests} calls after {settings.warmup} warm-up calls within {seconds} seconds: needs "
            "at least 1 call, 0 or more warm-up calls and more than 0 seconds. Pass larger numbers.",
            argument="requests",
            value=(requests, settings.warmup, seconds),
        )


def loads_of(
    batch: int | Sequence[int] | None,
    workload: Workload | Sequence[Workload],
    settings: LocalSettings,
    configuration: str = "",
) -> list[Load]:
    """Combine every batch size with every workload and experts implementation. Raises BadInput for an invalid load."""
    rows = [batch] if isinstance(batch, int) else list(batch or [1])
    workloads = [workload] if isinstance(workload, Workload) else list(workload)
    experts = [settings.experts] if isinstance(settings.experts, str | None) else list(settings.experts)
    loads = [Load(*load, configuration) for load in product(rows, workloads, experts)]
    if not loads or not all(isinstance(n, int) and n >= 1 for n in rows) or len({x.name for x in loads}) < len(loads):
        raise BadInput(
            f"Cannot benchmark batches of {batch} rows with {len(workloads)} workloads: a batch size is not a whole "
            "number from 1, or a load is repeated. Pass whole numbers from 1 and workloads of different lengths, "
            "each once.",
            argument="batch",
            value=rows,
        )
    return loads


def check_loads(model: Any, loads: Sequence[Load]) -> None:
    """Raise BadInput for loads that the model cannot run; its weights are not needed."""
    for name in dict.fromkeys(load.experts for load in loads):
        check_experts(model, name)
    for load in loads:
        Prompts(model, load.workload)


def check_experts(model: Any, name: str | None) -> None:
    """Raise BadInput for an experts implementation that the model does not support."""
    if name not in (None, "eager") and any(is_unfused(layer.experts) for layer in moe_layers(model)):
        raise BadInput(
            f"Cannot benchmark experts={name!r}: the experts of this model are separate Linears, as quantization "
            "needs, and only eager computes with them. Leave the name out, or load the model without quantization.",
            argument="experts",
            value=name,
        )
    if name == AUTO:
        register()
    try:
        model.get_correct_experts_implementation(
            model.config._experts_implementation if name is None else name or "no name"
        )
    except (ValueError, ImportError) as error:
        raise BadInput(
            f"Cannot benchmark experts={name!r}: {str(error).splitlines()[0]} Pass some of auto, eager, "
            "grouped_mm and batched_mm.",
            argument="experts",
            value=name,
        ) from error
