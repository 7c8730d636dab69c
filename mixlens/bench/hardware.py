"""Clock, memory and measured rates of a model's device."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mixlens.bench.roofline import Machine, Measured
from mixlens.errors import ModelError
from mixlens.models.layout import input_device

_RUNS, _WARM = 10, 2
_FEWEST_VALUES = 1 << 22
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Device:
    """Clock and memory of the hardware that a model runs on: its accelerators, or the CPU.

    `now` synchronizes the accelerators. Times are seconds since the Device was created, minus the time excluded by
    `leave_out`.
    """

    def __init__(self, model: Any) -> None:
        self.main = input_device(model)
        found = {p.device for p in model.parameters()} | {self.main}
        self._accelerators = sorted({d for d in found if d.type not in ("cpu", "meta")}, key=str)
        self._zero, self._left_out_s = time.perf_counter(), 0.0

    @property
    def name(self) -> str:
        """Name of the hardware."""
        if self.main.type == "cuda":
            return torch.cuda.get_device_name(self.main)
        return _processor() if self.main.type == "cpu" else str(self.main)

    def now(self) -> float:
        for device in self._accelerators:
            torch.accelerator.synchronize(device)
        return time.perf_counter() - self._zero

    def leave_out(self, since_s: float) -> None:
        """Set the clock back to `since_s`, to exclude bookkeeping from the measured time."""
        gap = time.perf_counter() - self._zero - since_s
        self._zero += gap
        self._left_out_s += gap

    def elapsed(self) -> float:
        """Return the seconds since the Device was created, including excluded time."""
        return self.now() + self._left_out_s

    def reset_peak(self) -> None:
        """Reset the peak memory counter."""
        try:
            for device in self._accelerators:
                torch.accelerator.reset_peak_memory_stats(device)
            if not self._accelerators:
                _CLEAR.write_text("5")
        except (RuntimeError, OSError):  # the device or the system has no counter
            return

    def peak(self) -> dict[str, int]:
        """Return {"peak_vram_bytes" or "peak_rss_bytes": bytes} since `reset_peak`; empty without a counter."""
        try:
            if self._accelerators:
                return {"peak_vram_bytes": sum(torch.accelerator.max_memory_allocated(d) for d in self._accelerators)}
            lines = _STATUS.read_text().splitlines()
            return {"peak_rss_bytes": next(int(s.split()[1]) << 10 for s in lines if s.startswith("VmHWM"))}
        except (RuntimeError, OSError, StopIteration):
            return {}

    def room(self) -> int | None:
        """Return the bytes available for a batch; None on an accelerator.

        An accelerator raises an error when its memory is full; on a CPU, the operating system would kill the process.
        """
        return None if self._accelerators else psutil.virtual_memory().available

    def release(self) -> None:
        """Free the memory of a failed batch."""
        if self._accelerators:
            torch.accelerator.empty_cache()


def measure(device: Device, dtype: torch.dtype, *, before: Machine | None = None) -> Machine:
    """Measure the rates of a device: memory bandwidth (the better of a copy and a sum) and matrix products.

    before   result of an earlier measurement; it is repeated and combined with the new one
    """
    on_cpu = device.main.type == "cpu"
    times = 1 if on_cpu else 10
    earlier = (before.bandwidth_bytes_per_s, before.matmul_flops_per_s) if before else (None, None)
    bandwidth = _bandwidth(device, (128 if on_cpu else 512) << 20, times, earlier[0])
    side = 1024 if on_cpu else 8192
    one, other = torch.randn(2, side, side, device=device.main).to(dtype)
    how = f"matrix product of {side} x {side} in {str(dtype).removeprefix('torch.')}"
    product = rate(lambda: one @ other, 2 * side**3, device.now, times, how)
    device.release()
    return Machine(device.name, bandwidth, _both(earlier[1], product))


def _bandwidth(device: Device, values: int, times: int, earlier: Measured | None = None) -> Measured:
    source, target = _arrays(device, values)
    size = f"{source.nbytes >> 20} MiB"
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        f"copy of {size}": (lambda: target.copy_(source), 2 * source.nbytes),
        f"sum of {size}": (source.sum, source.nbytes),
    }
    if earlier is not None:
        if earlier.how not in ways:  # less memory is free now, and smaller arrays would not be comparable
            return earlier
        ways = {earlier.how: ways[earlier.how]}
    found = [rate(run, amount, device.now, times, how) for how, (run, amount) in ways.items()]
    return _both(earlier, max(found, key=lambda measured: measured.estimate))


def _arrays(device: Device, values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate two float32 arrays, halving their size until they fit next to the model."""
    try:
        return torch.ones(values, device=device.main), torch.empty(values, device=device.main)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    device.release()
    if values <= _FEWEST_VALUES:
        raise ModelError(
            f"Cannot measure the bandwidth of {device.name}: less than {8 * values >> 20} MiB is free next to the "
            "model. Free memory, quantize the model, or spread it over more devices.",
            argument="memory",
            value=device.name,
        )
    return _arrays(device, values // 2)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that a device or the host is out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _both(earlier: Measured | None, later: Measured) -> Measured:
    return later if earlier is None else Measured.of([*earlier.bursts, *later.bursts], later.how)


def rate(run: Callable[[], Any], amount: float, now: Callable[[], float], times: int, how: str) -> Measured:
    """Measure `amount` per second in one burst: 10 runs of `times` calls each, after 2 discarded runs."""
    rates = []
    for _ in range(_WARM + _RUNS):
        start = now()
        for _ in range(times):
            run()
        rates.append(times * amount / (now() - start))
    return Measured.of([rates[_WARM:]], how)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    threads = torch.get_num_threads()
    return f"{name or platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
