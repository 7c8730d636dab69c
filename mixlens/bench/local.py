"""Benchmarks of a loaded model: generate, timed token by token on its device.

Every call of generate is a record like a request to an endpoint, with `rows` for its batch. It is sent when generate
begins and has a token event for each step that the device finishes, so time to first token is the prefill and time per
output token is the decode. No answer ends early. The first warm-up call of a load is its cold call, which includes
compilation if enabled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import count
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mixlens.bench.bench import RESULTS, Bench
from mixlens.bench.bytes_and_flops import Audits, Work
from mixlens.bench.events import Record, records_bytes
from mixlens.bench.hardware import Device, measure, out_of_memory
from mixlens.bench.local_loads import Load, LocalSettings, check_calls, check_experts, loads_of, settings_plan
from mixlens.bench.model_prompts import Prompts
from mixlens.bench.prompts import Workload
from mixlens.bench.record_sink import Kept
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.endpoints.protocols import TOKEN, Event
from mixlens.errors import BadInput, MixlensError, ModelError
from mixlens.models.decoding import Choice, compile_config, one_graph
from mixlens.models.layout import moe_layers
from mixlens.models.provenance import describe, identity
from mixlens.recording.compiled import CompiledRecorder

PACKAGES = ("mixlens", "torch", "transformers", "accelerate")


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
    """Measure how fast a loaded model generates; called by `mixlens.benchmark`.

    batch     rows per batch, one or several
    requests  measured calls of generate per load
    device    clock and memory; None creates one for the model

    Raises BadInput for invalid loads, prompts and answers longer than the context, and unknown experts
    implementations; ModelError if the model is not a mixture of experts; RunError as for an endpoint.
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
        "model": subject.identity,
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
    """Complete the run directory, if any, and return the Bench of all records. Raises an interrupt again."""
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
    """A loaded model to be measured under some loads.

    device         clock and memory; None creates one for the model
    keep_failures  whether an error of a load becomes a record, so that the next load is still measured

    Raises BadInput for unsupported experts implementations, and for prompts and answers longer than the model's
    context; ModelError if the model is not a mixture of experts.
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
        self._numbers = count()
        self.choices: dict[str, Choice] = {}

    @cached_property
    def _audits(self) -> Audits:
        return Audits.of(self._model)

    @cached_property
    def _described(self) -> dict[str, Any]:
        return describe(self._model, self._audits.whole)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the model's outputs; cached, since computing it reads every weight."""
        return identity(self._model, self._described)

    def measure(self, requests: int, kept: Kept) -> tuple[dict[str, Any], str | None]:
        """Run all calls; return the metadata of the model and device, and what stopped the calls, if anything."""
        device = self._device or Device(self._model)
        machine = measure(device, self._model.dtype)
        caller = _Caller(self._model, device, self._settings, self._audits)
        stopped = self._run(caller, requests, kept)
        if stopped != "an interrupt":
            with suppress(RuntimeError, MemoryError, ModelError):  # the first measurement is enough
                machine = measure(device, self._model.dtype, before=machine)
        told = self.prompts[self._loads[0].name].plan()["ids"]
        local = {
            **settings_plan(self._settings),
            "layers": len(moe_layers(self._model)),
            "prompts": told,
            "decode": {
                name: {"compiled": choice.compiled, "why": str(choice)} for name, choice in self.choices.items()
            },
        }
        return {"model": self._described | self.identity, "machine": asdict(machine), "local": local}, stopped

    def _run(self, caller: _Caller, requests: int, kept: Kept) -> str | None:
        """Run all calls of all loads; return what stopped them, if anything. A load that does not fit is left."""
        for load in self._loads:
            try:
                self._measure(caller, load, requests, kept)
            except _Stopped as stopped:
                if stopped.by is not None:
                    return stopped.by
            except KeyboardInterrupt:  # between two calls
                return "an interrupt"
            except Exception as error:
                if not self._keep_failures:
                    raise
                kept.keep(failed(load, error))
        return None

    def _measure(self, caller: _Caller, load: Load, requests: int, kept: Kept) -> None:
        """Run the calls of one load, compiled or not as set, or whichever the first calls show to be faster."""
        columns, warmup, compiled = self.prompts[load.name].columns, self._settings.warmup, self._settings.compiled
        calls = partial(self._calls, caller, load, kept)
        with caller.ready(load, columns, compiled=bool(compiled)):
            warm = calls("warm-up", warmup)
            choice = Choice(eager := _step_s(warm), requests * (load.workload.output_tokens - 1) * (eager or 0.0))
            if compiled is not None or not choice.worth_compiling or load.experts is not None:
                if compiled is None:
                    self.choices[load.name] = choice
                calls("measured", requests)
                return
        with ExitStack() as stack:
            try:
                stack.enter_context(caller.ready(load, columns, compiled=True))
                cold, warm = calls("warm-up", 1), calls("warm-up", 1)
                compile_s = _call_s(cold) - _call_s(warm)
                choice = replace(choice, compiled_step_s=_step_s(warm), compile_s=compile_s)
            except (_Stopped, KeyboardInterrupt):
                raise
            except Exception as error:  # a compiler may raise anything; the model decodes without it
                fault = str(error).strip().split("\n")[0][:300]
                choice = replace(choice, fault=f"{type(error).__name__}: {fault}")
            self.choices[load.name] = choice
            if not choice.compiled:
                stack.close()
                stack.enter_context(caller.ready(load, columns, compiled=False))
            calls("measured", requests)

    def _calls(self, caller: _Caller, load: Load, kept: Kept, phase: str, count: int) -> Record | None:
        """Run `count` calls of one phase and return the last record. Raises _Stopped if no other call may follow."""
        settings, prompts, record = self._settings, self.prompts[load.name], None
        for index in range(count):
            if settings.max_seconds is not None and caller.device.elapsed() >= settings.max_seconds:
                raise _Stopped(f"the cap of {settings.max_seconds:g} seconds")
            ids, mask = prompts.batch([next(self._numbers) for _ in range(load.rows)])
            record = caller.call(load, ids, mask, index, phase)
            kept.keep(record)
            if record.outcome == "interrupted":
                raise _Stopped("an interrupt")
            if record.outcome == "memory":
                raise _Stopped(None)
        return record


class _Stopped(Exception):
    """Raised when no other call of this load may follow, and, if `by` is set, none of any load."""

    def __init__(self, by: str | None) -> None:
        self.by = by


def _call_s(record: Record | None) -> float:
    return 0.0 if record is None or record.sent_s is None else record.ended_s - record.sent_s


def _step_s(record: Record | None) -> float | None:
    """Return the mean seconds per decode step; None for a failed call, or one with a single token."""
    if record is None or record.outcome != "ok" or len(record.events) < 2:
        return None
    return (record.events[-1].at_s - record.events[0].at_s) / (len(record.events) - 1)


def failed(load: Load, error: Exception) -> Record:
    """Return the record of a load that could not be measured, with the reason."""
    said = str(error).strip() if isinstance(error, MixlensError) else f"{type(error).__name__}: {error}".strip()
    return Record(0, load.name, "measured", "failed", (), 0.0, 0.0, detail=said[:500], rows=load.rows)


class _Stamps(BaseStreamer):
    """Times at which generate delivered each token of the batch to the host; skips the prompt, which comes first."""

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
    """Calls generate and records each call."""

    def __init__(self, model: Any, device: Device, settings: LocalSettings, audits: Audits) -> None:
        self.model, self.device, self.settings = model, device, settings
        self._work = Work(model, audits)
        self._recorder: CompiledRecorder | None = None
        self._ended_s: float | None = None

    @contextmanager
    def ready(self, load: Load, columns: int, *, compiled: bool) -> Iterator[None]:
        """Set up the model for the load, and restore it afterwards."""
        with ExitStack() as stack:
            stack.callback(setattr, self.model, "generation_config", self.model.generation_config)
            self.model.generation_config = self._generation(load, compiled)
            if compiled:
                stack.enter_context(one_graph(self.model))
            if load.experts is not None:
                stack.callback(self.model.set_experts_implementation, self.model.config._experts_implementation)
                self.model.set_experts_implementation(load.experts)
            if self.settings.recording:
                room = load.rows * (columns + load.workload.output_tokens)
                self._recorder = stack.enter_context(CompiledRecorder(self.model, tokens=room, signals=()))
            try:
                yield
            finally:
                self._recorder = None

    def call(self, load: Load, ids: torch.Tensor, mask: torch.Tensor, index: int, phase: str) -> Record:
        """Call generate once and return its record, whatever the outcome."""
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

    def _generation(self, load: Load, compiled: bool) -> GenerationConfig:
        config = GenerationConfig(
            max_new_tokens=load.workload.output_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static" if self.settings.static_cache or compiled else None,
            disable_compile=not compiled,
        )
        if compiled:
            config.compile_config = compile_config()
        return config

    def _check_room(self, load: Load, columns: int) -> None:
        """Raise MemoryError if the batch does not fit; on a CPU the operating system would kill the process."""
        needed = load.rows * self._work.cached_bytes(columns + load.workload.output_tokens)
        room = self.device.room()
        if room is not None and needed > room:
            raise MemoryError(f"keys and values of the batch need {needed:,} bytes, and {room:,} are free")
