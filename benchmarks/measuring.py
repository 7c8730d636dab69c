"""What the benchmarks share: interleaved pairs, the interval of their ratio, and where and when it was measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import mixlens
from mixlens.runs import now, versions

PACKAGES = ("torch", "transformers", "numpy", "pandas", "xarray", "nnsight", "transformer-lens")


def seconds(run: Callable[[], Any], settle: Callable[[], None] = lambda: None) -> float:
    """Wall-clock time of one call; `settle` waits for a device, before the clock starts and before it stops."""
    settle()
    start = perf_counter()
    run()
    settle()
    return perf_counter() - start


def interleaved(
    bare: Callable[[], Any], other: Callable[[], Any], *, pairs: int, settle: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """`other` against `bare`, run in turns so that both meet the same machine; every second pair runs `other` first.

    One pair is run beforehand and not counted. Gives the median of the ratios of each pair with its 95 % interval
    (percentiles of 10,000 bootstrap samples of the pairs), the median times, and every pair's.
    """
    measured = []
    for number in range(pairs + 1):
        if number % 2:
            first, second = seconds(other, settle), seconds(bare, settle)
            measured.append((second, first))
        else:
            measured.append((seconds(bare, settle), seconds(other, settle)))
    times = np.array(measured[1:])
    ratio = times[:, 1] / times[:, 0]
    draws = np.random.default_rng(0).integers(0, pairs, (10_000, pairs))
    low, high = np.percentile(np.median(ratio[draws], axis=1), [2.5, 97.5])
    bare_s, other_s = np.median(times, axis=0)
    return {
        "ratio": round(float(np.median(ratio)), 4),
        "ci_low": round(float(low), 4),
        "ci_high": round(float(high), 4),
        "pairs": pairs,
        "bare_s": round(float(bare_s), 4),
        "other_s": round(float(other_s), 4),
        "bare_and_other_s": times.round(4).tolist(),
    }


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
