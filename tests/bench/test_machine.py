"""The device that a model lies on: its rates and its memory, as measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens.bench import hardware as machine
from mixlens.bench.hardware import Device, rate
from mixlens.bench.roofline import Measured


def test_a_rate_is_the_mean_of_ten_runs_after_two():
    clock, runs = iter(np.cumsum([0, 9, 0, 9, 0, *[1, 0] * 10]).tolist()), []
    found = rate(lambda: runs.append(1), 6.0, lambda: float(next(clock)), 2, "a copy")
    assert len(runs) == 24
    assert (found.estimate, found.ci_low, found.ci_high, found.n, found.how) == (12.0, 12.0, 12.0, 10, "a copy")


def test_a_device_is_measured_and_its_memory_counted(monkeypatch):
    monkeypatch.setattr(
        machine, "_bandwidth", lambda device, values, times, earlier: Measured(2.0, 1.0, 3.0, 10, "copy")
    )
    device = Device(tiny_mixtral())
    found = machine.measure(device, torch.float32)
    assert found.matmul_flops_per_s.ci_low < found.matmul_flops_per_s.estimate < found.matmul_flops_per_s.ci_high
    device.reset_peak()
    low = device.peak()
    block = torch.ones(40 << 20, dtype=torch.uint8)
    high = device.peak()
    if low:  # where the system counts
        assert high["peak_rss_bytes"] - low["peak_rss_bytes"] > 0.9 * block.nbytes


@pytest.mark.parametrize("free", [1 << 23, 1 << 20])
def test_a_device_that_is_nearly_full_is_measured_with_smaller_arrays(free, monkeypatch):
    whole = torch.ones

    def ones(values, **options):
        if values > free:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(values, **options)

    monkeypatch.setattr("mixlens.bench.hardware.torch.ones", ones)
    device = Device(tiny_mixtral())
    if free < 1 << 22:
        with refused(ml.ModelError, "memory"):
            machine.measure(device, torch.float32)
        return
    before = machine.measure(device, torch.float32)
    assert "32 MiB" in before.bandwidth_bytes_per_s.how
    free >>= 1  # and less than that after the loads
    after = machine.measure(device, torch.float32, before=before)
    assert after.bandwidth_bytes_per_s == before.bandwidth_bytes_per_s
    assert after.matmul_flops_per_s.n == 2 * before.matmul_flops_per_s.n
