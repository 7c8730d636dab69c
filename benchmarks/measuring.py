"""What the benchmarks share: interleaved pairs, the interval of their ratio, and where and when it was measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

import mixlens
from mixlens.core.run_dir import now, versions

PACKAGES = ("torch", "transformers", "numpy", "pandas", "xarray", "nnsight", "transformer-lens")


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = perf_counter()
    run()
    return perf_counter() - start


def interleaved(
    bare: Callable[[], Any],
    other: Callable[[], Any],
    *,
    pairs: int,
    settle: Callable[[], Any] = lambda: None,
    prepare: Callable[[bool], None] = lambda is_other: None,
) -> dict[str, Any]:
    """`other` against `bare`, run in turns so that both meet the same machine; every second pair runs `other` first.

    settle   waits for a device to finish; called before the clock starts and before it stops
    prepare  called before each with whether it is `other`, untimed

    One pair is run beforehand and not counted. Gives the median of the ratios of each pair with its 95 % interval
    (percentiles of 10,000 bootstrap samples of the pairs), the median times and every pair's; and the same ratio in
    processor time, which others on the machine disturb less, and which leaves out waiting for the disk or a device.
    """

    def clocks(run: Callable[[], Any]) -> tuple[float, float]:
        prepare(run is other)
        settle()
        start = perf_counter(), process_time()
        run()
        settle()
        return perf_counter() - start[0], process_time() - start[1]

    measured = []
    for number in range(pairs + 1):
        if number % 2:
            second, first = clocks(other), clocks(bare)
            measured.append((first, second))
        else:
            measured.append((clocks(bare), clocks(other)))
    times = np.array(measured[1:])
    wall, processor = times[..., 0], times[..., 1]
    bare_s, other_s = np.median(wall, axis=0)
    ratio, low, high = _median_ratio(wall)
    return {
        "ratio": ratio,
        "ci_low": low,
        "ci_high": high,
        "processor_time": dict(zip(("ratio", "ci_low", "ci_high"), _median_ratio(processor), strict=True)),
        "pairs": pairs,
        "bare_s": round(float(bare_s), 4),
        "other_s": round(float(other_s), 4),
        "bare_and_other_s": wall.round(4).tolist(),
    }


def _median_ratio(times: np.ndarray) -> tuple[float, float, float]:
    ratio = times[:, 1] / times[:, 0]
    draws = np.random.default_rng(0).integers(0, len(ratio), (10_000, len(ratio)))
    low, high = np.percentile(np.median(ratio[draws], axis=1), [2.5, 97.5])
    return round(float(np.median(ratio)), 4), round(float(low), 4), round(float(high), 4)


def header(*, torch: Any = None) -> dict[str, Any]:
    """Machine, versions, date and load. Benchmarks that use torch pass it, for its threads and its GPU."""
    found: dict[str, Any] = {
        "date": now(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
        "versions": {"mixlens": mixlens.__version__, **versions(*PACKAGES)},
    }
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def write(path: str | None, benchmark: str, measured_on: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """One result file: the header, the load at the end, and the results. Without a path it is only printed."""
    load = [round(load, 2) for load in os.getloadavg()]
    content = {"benchmark": benchmark, "measured_on": {**measured_on, "load_average_at_end": load}, **results}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if path is None:
        print(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")
    print(f"wrote {path}")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
