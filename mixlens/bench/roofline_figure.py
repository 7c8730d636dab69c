"""Roofline figure: achieved rates of a model's loads, below the measured limits of its device."""

from __future__ import annotations

from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from mixlens.bench.bench import Bench
from mixlens.bench.local_tables import machine_of
from mixlens.bench.roofline import Machine
from mixlens.errors import MissingSignal
from mixlens.plot.colours import series_colours
from mixlens.plot.style import INK, MARKERS, MUTED, PAGE, drawing, heading, in_legend, printable


def roofline(bench: Bench, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw operations per second against operations per byte of every load, for prefill (filled) and decode (hollow).

    The slanted line is the measured bandwidth and the flat line the measured matrix throughput; whiskers are 95 %
    intervals. The distance of a marker below the line is the possible speedup.

    Parameters
    ----------
    bench : Bench
        Benchmark of a loaded model, measured with recording.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    title : str, optional
        Title. By default the main finding, if one was computed, or a description of the figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    MissingSignal
        If `bench` is of an endpoint, or no routing was recorded.

    Examples
    --------
    >>> bench = ml.open("runs/local")  # doctest: +SKIP
    >>> ml.show.roofline(bench).get_ylabel()  # doctest: +SKIP
    'operations per second'
    """
    parts = bench.configurations()
    machines = {name: machine_of(part.meta) for name, part in parts.items()}
    table = bench.roofline()
    levels = list(dict.fromkeys(table["level"]))
    rows = {(r["level"], r["phase"], r["metric"]): r for r in table.to_dict("records")}
    intensity = {key[:2]: r["estimate"] for key, r in rows.items() if key[2] == "flops_per_byte"}
    intensity = {key: value for key, value in intensity.items() if np.isfinite(value)}
    if not intensity:
        raise MissingSignal(
            "Cannot draw a roofline: no call recorded the bytes that it read. Measure with recording, as in "
            "LocalSettings(recording=True).",
            argument="bench",
        )
    colours = dict(zip(levels, series_colours(len(levels)), strict=True))
    with drawing(ax, PAGE, 3.2) as ax:
        for (level, phase), x in intensity.items():
            speed = rows[level, phase, "flops_per_s"]
            estimate, low, high = (speed[name] for name in ("estimate", "ci_low", "ci_high"))
            ax.errorbar(
                x,
                estimate,
                yerr=np.nan_to_num([[estimate - low], [high - estimate]]),
                fmt=MARKERS[levels.index(level) % len(MARKERS)],
                color=colours[level],
                markerfacecolor=colours[level] if phase == "prefill" else "white",
                markersize=5,
                capsize=2,
                elinewidth=0.8,
                label=in_legend(level) if phase == "prefill" else None,
            )
        ridges = [m.matmul_flops_per_s.estimate / m.bandwidth_bytes_per_s.estimate for m in machines.values()]
        reached = [*intensity.values(), *ridges]
        x = np.geomspace(min(reached) / 4, max(reached) * 4, 200)
        ax.set_xscale("log")
        ax.set_yscale("log")
        # One roof per dtype: on one device, only the throughput of matrix products differs.
        roofs = {part.meta["model"]["dtype"]: machines[name] for name, part in reversed(parts.items())}
        for style, (dtype, machine) in zip(cycle(("-", "--", ":")), reversed(roofs.items())):
            _roof(ax, x, machine, style, dtype if len(roofs) > 1 else "")
        ax.set_xlabel("operations per byte that must be read")
        ax.set_ylabel("operations per second")
        calls = max(row["n"] for row in rows.values())
        dtype = f" in {bench.meta['model']['dtype']}" if "dtype" in bench.meta["model"] else ""
        heading(
            ax,
            title or f"{bench.meta['model']['name']}{dtype} on {next(iter(machines.values())).name}",
            f"Filled: prefill; hollow: decode. Whiskers: 95 % over up to {calls} calls. Band: 95 % of the device. "
            "Bytes: recorded routing.",
        )
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def _roof(ax: Axes, x: np.ndarray, machine: Machine, style: str, dtype: str) -> None:
    """Draw the limit of a device at each number of operations per byte, with the intervals of both rates."""
    bandwidth, peak = machine.bandwidth_bytes_per_s, machine.matmul_flops_per_s
    said = f"{bandwidth.estimate / 1e9:,.4g} GB/s measured", f"{peak.estimate / 1e9:,.4g} GFLOP/s measured"
    label = printable(f"{', '.join(said)}, {dtype}") if dtype else None
    ax.plot(x, np.minimum(x * bandwidth.estimate, peak.estimate), style, color=INK, linewidth=1.2, label=label)
    low, high = np.minimum(x * bandwidth.ci_low, peak.ci_low), np.minimum(x * bandwidth.ci_high, peak.ci_high)
    ax.fill_between(x, low, high, color=INK, alpha=0.12, lw=0)
    if not dtype:
        ax.text(x[0] * 1.7, x[0] * bandwidth.estimate, said[0], color=MUTED, fontsize=7)
        ax.text(x[-1], peak.estimate * 1.15, said[1], color=MUTED, fontsize=7, ha="right")
