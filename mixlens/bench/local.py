"""What ml.benchmark does with a loaded model: generate, timed token by token where it runs.

Every call of generate is a record as of a request to an endpoint, with `rows` for its batch: sent when generate begins,
a token event when the device has finished a step, so that time to first token is the prefill and time per output token
is the decode. Answers have full length: nothing ends one early. The first warm-up call of a load is its cold one, with
compilation if that was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count, product
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mixlens.bench.bench import RESULTS, Bench
from mixlens.bench.bytes_and_flops import Work
from mixlens.bench.events import Record, records_bytes
from mixlens.bench.hardware import Device, measure, out_of_memory
from mixlens.bench.local_tables import in_configuration
from mixlens.bench.model_prompts import Prompts
from mixlens.bench.prompts import Workload
from mixlens.bench.record_sink import Kept
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.endpoints.protocols import TOKEN, Event
from mixlens.errors import BadInput, MixlensError, ModelError
from mixlens.models.layout import moe_layers
from mixlens.models.provenance import describe, identity
from mixlens.models.quantization.unfuse import is_unfused
from mixlens.recording.compiled import CompiledRecorder

PACKAGES = ("mixlens", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class LocalSettings:
    """Settings of how a loaded model is benchmarked.

    Parameters
    ----------
    warmup : int, optional
        Calls before each load that are kept and never counted; the first of them is the cold one.
    experts : str or Sequence[str], optional
        Experts implementations to measure in turn, as "eager" or "grouped_mm"; None for the model's own.
    static_cache : bool, optional
        Keys and values in memory set aside for the longest sequence.
    compiled : bool, optional
        Decode through torch.compile as one graph, which needs, and brings, a static cache.
    recording : bool, optional
        Routing recorded in every call, from which the bytes that it must read are known.
    max_seconds : float, optional
        After which no call starts; None for no cap.
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
    compiled: bool = False
    recording: bool = True
    max_seconds: float | None = 600.0
    progress: bool = True


@dataclass(frozen=True)
class Load:
    """So many rows at a time, of one workload, with one experts implementation (None: the model's own).

    configuration  in which the model was loaded, where there are several
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


def benchmark_model(
    model: Any,
    *,
    batch: int | Sequence[int] | None,
    requests: int,
    out: str | os.PathLike[str] | None,
    workload: Workload | Sequence[Workload],
    settings: Any = None,
    device: Device | None = None,
) -> Bench:
    """How fast a loaded model generates; `mixlens.benchmark` calls this.

    batch     rows of a batch, one or several
    requests  measured calls of generate of each load
    device    clock and memory; made for the model when it is not given

    Raises BadInput for loads that cannot be, prompts and answers longer than the context, unknown experts
    implementations; ModelError when it is no mixture of experts; RunError as for an endpoint.
    """
    settings = LocalSettings() if settings is None else settings
    if not isinstance(settings, LocalSettings) or not hasattr(model, "generate"):
        raise BadInput(
            f"Cannot benchmark a {type(model).__name__} with {type(settings).__name__}: an Endpoint takes "
            "BenchSettings, and a loaded model LocalSettings. For a name, pass ml.load(...).",
            argument="model",
            value=type(model).__name__,
        )
    check_calls(requests, settings)
    loads = loads_of(batch, workload, settings)
    subject = Subject(model, loads, settings, device=device)
    plan = {
        "model": identity(model),
        "loads": [load.name for load in loads],
        "requests": requests,
        "workloads": [subject.prompts[load.name].plan() for load in loads],
        "settings": settings_plan(settings),
    }
    started = now()
    with nullcontext() if out is None else RunWriter(out, "bench", plan) as writer:
        if writer is not None and writer.complete:
            return Bench.open(writer.path)
        with Kept(writer, len(loads) * requests, show=settings.progress) as kept:
            about, stopped = subject.measure(requests, kept)
        return finished(kept, writer, {"created": started, **about, "stopped": stopped})


def finished(kept: Kept, writer: RunWriter | None, meta: dict[str, Any]) -> Bench:
    """The Bench of all that was kept, complete on disk where there is a run directory; raises an interrupt again."""
    meta |= {
        "counts": {"requests": len(kept.records), "succeeded": sum(r.outcome == "ok" for r in kept.records)},
        "versions": versions(*PACKAGES),
    }
    if writer is not None:
        writer.finish(meta, {RESULTS: records_bytes(kept.records)})
    if meta["stopped"] == "an interrupt":
        raise KeyboardInterrupt
    return Bench(kept.records, meta, path=writer and writer.path)


class Subject:
    """A loaded model that is to be measured under some loads.

    device         clock and memory; made for the model when it is not given
    keep_failures  what a load raises becomes a record, and the next load is measured

    Raises BadInput for experts implementations that the model cannot have, and prompts and answers longer than its
    context; ModelError when it is no mixture of experts.
    """

    def __init__(
        self,
        model: Any,
        loads: Sequence[Load],
        settings: LocalSettings,
        *,
        device: Device | None = None,
        keep_failures: bool = False,
    ) -> None:
        for name in dict.fromkeys(load.experts for load in loads):
            check_experts(model, name)
        self._model, self._loads, self._settings = model, loads, settings
        self.prompts = {load.name: Prompts(model, load.workload) for load in loads}
        self._device, self._keep_failures = device, keep_failures

    def measure(self, requests: int, kept: Kept) -> tuple[dict[str, Any], str | None]:
        """What is to be said of the model and its device, and what stopped the calls, if something did."""
        device = self._device or Device(self._model)
        machine = measure(device, self._model.dtype)
        caller = _Caller(self._model, device, self._settings)
        stopped = self._run(caller, requests, kept)
        if stopped != "an interrupt":
            with suppress(RuntimeError, MemoryError, ModelError):  # what was measured before stands alone
                machine = measure(device, self._model.dtype, before=machine)
        told = self.prompts[self._loads[0].name].plan()["ids"]
        local = {**settings_plan(self._settings), "layers": len(moe_layers(self._model)), "prompts": told}
        described = describe(self._model)
        model = described | identity(self._model, described)
        return {"model": model, "machine": asdict(machine), "local": local}, stopped

    def _run(self, caller: _Caller, requests: int, kept: Kept) -> str | None:
        """All calls of all loads; what stopped them, if something did. A load that does not fit is left at once."""
        settings, numbers = self._settings, count()
        for load in self._loads:
            prompts = self.prompts[load.name]
            phases = ["warm-up"] * settings.warmup + ["measured"] * requests
            try:
                with caller.ready(load, prompts.columns):
                    for index, phase in enumerate(phases):
                        if settings.max_seconds is not None and caller.device.elapsed() >= settings.max_seconds:
                            return f"the cap of {settings.max_seconds:g} seconds"
                        ids, mask = prompts.batch([next(numbers) for _ in range(load.rows)])
                        place = index if phase == "warm-up" else index - settings.warmup
                        record = caller.call(load, ids, mask, place, phase)
                        kept.keep(record)
                        if record.outcome == "interrupted":
                            return "an interrupt"
                        if record.outcome == "memory":
                            break
            except KeyboardInterrupt:  # between two calls
                return "an interrupt"
            except Exception as error:
                if not self._keep_failures:
                    raise
                kept.keep(failed(load, error))
        return None


def failed(load: Load, error: Exception) -> Record:
    """The record of a load that could not be measured, with the reason."""
    said = str(error).strip() if isinstance(error, MixlensError) else f"{type(error).__name__}: {error}".strip()
    return Record(0, load.name, "measured", "failed", (), 0.0, 0.0, detail=said[:500], rows=load.rows)


class _Stamps(BaseStreamer):
    """When generate had each token of the batch on the host; the prompt, which comes first, is passed over."""

    def __init__(self, device: Device) -> None:
        self._device, self._prompt = device, True
        self.at_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.at_s.append(self._device.now())
        self._prompt = False

    def end(self) -> None:
        pass


class _Caller:
    """Calls generate, and makes records of it."""

    def __init__(self, model: Any, device: Device, settings: LocalSettings) -> None:
        self.model, self.device, self.settings = model, device, settings
        self._work = Work(model)
        self._recorder: CompiledRecorder | None = None
        self._ended_s: float | None = None

    @contextmanager
    def ready(self, load: Load, columns: int) -> Iterator[None]:
        """The model as the load wants it; as it was before, afterwards."""
        with ExitStack() as stack:
            stack.callback(setattr, self.model, "generation_config", self.model.generation_config)
            self.model.generation_config = self._generation(load)
            if load.experts is not None:
                stack.callback(self.model.set_experts_implementation, self.model.config._experts_implementation)
                self.model.set_experts_implementation(load.experts)
            if self.settings.compiled:  # shapes of another load would make sizes dynamic
                torch.compiler.reset()
            if self.settings.recording:
                room = load.rows * (columns + load.workload.output_tokens)
                self._recorder = stack.enter_context(CompiledRecorder(self.model, tokens=room, signals=()))
            try:
                yield
            finally:
                self._recorder = None

    def call(self, load: Load, ids: torch.Tensor, mask: torch.Tensor, index: int, phase: str) -> Record:
        """The record of one call of generate, however it ends."""
        outcome, detail, stamps = "ok", "", _Stamps(self.device)
        ids, mask = ids.to(self.device.main), mask.to(self.device.main)
        self.device.reset_peak()
        if self._ended_s is not None:
            self.device.leave_out(self._ended_s)
        sent = self.device.now()
        try:
            self._check_room(load, ids.shape[1])
            with torch.inference_mode():
                self.model.generate(ids, attention_mask=mask, streamer=stamps)
        except KeyboardInterrupt:
            outcome, detail = "interrupted", f"after {len(stamps.at_s)} tokens"
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            outcome, detail = "memory", str(error).strip().split("\n")[0][:300]
            self.device.release()
        if outcome != "ok" and self._recorder is not None:
            self._recorder.clear()
        self._ended_s = ended = stamps.at_s[-1] if outcome == "ok" else self.device.now()
        steps = self._work.of_call(self._recorder, mask.sum(1).tolist(), len(stamps.at_s), complete=outcome == "ok")
        events = [Event(at_s, TOKEN, **step) for at_s, step in zip(stamps.at_s, steps, strict=True)]
        if outcome == "ok":
            read = round(int(mask.sum()) / len(ids))
            events[-1] = replace(events[-1], finish="length", input_tokens=read, output_tokens=len(events))
        record = Record(index, load.name, phase, outcome, tuple(events), sent, ended, sent_s=sent, detail=detail)
        return replace(record, rows=load.rows, **self.device.peak())

    def _generation(self, load: Load) -> GenerationConfig:
        static = self.settings.static_cache or self.settings.compiled
        config = GenerationConfig(
            max_new_tokens=load.workload.output_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static" if static else None,
            disable_compile=not self.settings.compiled,
        )
        if self.settings.compiled:
            mode = "reduce-overhead" if self.device.main.type == "cuda" else "default"
            compile_config: Any = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
            compile_config._compile_all_devices = True
            config.compile_config = compile_config
        return config

    def _check_room(self, load: Load, columns: int) -> None:
        """On a CPU the system would kill the process, so that the run were lost."""
        needed = load.rows * self._work.cached_bytes(columns + load.workload.output_tokens)
        room = self.device.room()
        if room is not None and needed > room:
            raise MemoryError(f"keys and values of the batch need {needed:,} bytes, and {room:,} are free")


def settings_plan(settings: LocalSettings) -> dict[str, Any]:
    """What decides a measurement, as plain values."""
    return {name: value for name, value in asdict(settings).items() if name != "progress"}


def check_calls(requests: int, settings: LocalSettings) -> None:
    """Raises BadInput for numbers of calls or seconds that are none."""
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
    """Every batch size with every workload and experts implementation. Raises BadInput for what is no load."""
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
    """Raises BadInput for loads that the model cannot take; its weights need not be there."""
    for name in dict.fromkeys(load.experts for load in loads):
        check_experts(model, name)
    for load in loads:
        Prompts(model, load.workload)


def check_experts(model: Any, name: str | None) -> None:
    """Raises BadInput for an experts implementation that the model cannot have."""
    if name not in (None, "eager") and any(is_unfused(layer.experts) for layer in moe_layers(model)):
        raise BadInput(
            f"Cannot benchmark experts={name!r}: the experts of this model are separate Linears, as quantization "
            "needs, and only eager computes with them. Leave the name out, or load the model without quantization.",
            argument="experts",
            value=name,
        )
    try:
        model.get_correct_experts_implementation(
            model.config._experts_implementation if name is None else name or "no name"
        )
    except (ValueError, ImportError) as error:
        raise BadInput(
            f"Cannot benchmark experts={name!r}: {str(error).splitlines()[0]} Pass some of eager, grouped_mm and "
            "batched_mm.",
            argument="experts",
            value=name,
        ) from error
