"""The command `bench`, which measures the speed of an endpoint or of a model on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from mixlens.cli.app import EXIT_DONE, EXIT_FAILED, Result, app
from mixlens.cli.options import (
    Dollars,
    Dtypes,
    Integers,
    Names,
    NotNegative,
    Numbers,
    Output,
    Positive,
    Schemes,
    Seconds,
    Server,
    Slo,
)
from mixlens.cli.tables import check_csv, rows_of, written
from mixlens.core.run_dir import check_out
from mixlens.endpoints.protocols import WireProtocol  # noqa: F401  (cyclopts resolves the inherited fields here)
from mixlens.errors import BadInput, RunError

if TYPE_CHECKING:
    from mixlens.bench.bench import Bench
    from mixlens.bench.prompts import Workload

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
_MET = 0.95  # share of requests that must meet the limits
_LOCAL = Group("For a model measured on this machine")
_REMOTE = Group("For an endpoint")


@Parameter(name="*", group=_LOCAL)
@dataclass(frozen=True)
class Local:
    """Options for loading and measuring a model on this machine.

    Parameters
    ----------
    device_map
        Device map as in mixlens.load, such as auto, cpu or cuda:0.
    dtype
        One or more of float32, bfloat16 and float16; each is measured.
    quantization
        Schemes, each measured: "none,nf4". Separate schemes for parts of the model by semicolons:
        "none;attention=nf4,experts=hqq2".
    experts
        One or more of auto, eager, grouped_mm and batched_mm; each is measured.
    static_cache
        Keep keys and values in a preallocated cache.
    compiled
        Decode through one compiled graph in a static cache. By default only where it saves more than the minute that
        compiling takes.
    no_recording
        Do not record routing, and thus not the bytes read.
    """

    device_map: str | None = None
    dtype: Dtypes | None = None
    quantization: Schemes = None
    experts: Names | None = None
    static_cache: bool = False
    compiled: bool | None = None
    no_recording: bool = False


@Parameter(name="*", group=_REMOTE)
@dataclass(frozen=True)
class Remote(Server):
    """Options for the load and the cost of an endpoint.

    Parameters
    ----------
    model
        Name of the model on the server. Optional for openrouter, deepinfra and modelslab.
    protocol
        Protocol of the endpoint. By default openai-chat.
    key_env
        Environment variable with the key.
    provider
        For openrouter: only this provider may answer.
    sweep
        Measure concurrencies 1, 2, 4 ... up to N, until more concurrency only adds waiting.
    rate
        Requests per second, sent whether or not earlier ones have finished.
    max_dollars
        Stop before more than this is spent.
    price
        Dollars per million input and output tokens. By default those of the bundled price list.
    """

    sweep: Positive | None = None
    rate: Numbers | None = None
    max_dollars: Dollars | None = None
    price: Annotated[Numbers, Parameter(metavar="IN,OUT")] | None = None


@app.command
def bench(
    target: str,
    /,
    *,
    concurrency: Integers | None = None,
    arrivals: Literal["poisson", "constant"] = "poisson",
    requests: Positive = 32,
    warmup: NotNegative = 1,
    prompt_tokens: Positive = 256,
    output_tokens: Positive = 128,
    prompts: str | None = None,
    text: str = "text",
    max_seconds: Seconds = 600.0,
    slo: Slo = None,
    csv: str | None = None,
    out: str | None = None,
    remote: Remote = Remote(),
    local: Local = Local(),
    output: Output = Output(),
) -> Result:
    """Measure the speed of an endpoint, or of a model on this machine.

    Parameters
    ----------
    target
        URL such as http://127.0.0.1:8000/v1, or openrouter, deepinfra or modelslab; or a model to load: a Hub id, a
        folder, or "demo".
    concurrency
        Numbers of concurrent requests. By default 1.
    arrivals
        Distribution of arrival times for --rate.
    requests
        Measured requests per load.
    warmup
        Unmeasured requests to send first, per concurrent request.
    prompt_tokens
        Tokens per prompt.
    output_tokens
        Maximum tokens per answer.
    prompts
        Text file with one prompt per line, or JSON Lines.
    text
        Text column of JSON Lines.
    max_seconds
        Start no request after this many seconds.
    slo
        Limits in seconds. The exit status is 1 if fewer than 95 % of the requests of a load meet all limits.
    csv
        Also write the table to this file.
    out
        Run directory. By default out/bench-DATE-TIME.
    """
    from mixlens.bench.prompts import Workload, read_prompts
    from mixlens.bench.sweep import knee

    _check(target, local, remote, concurrency)
    folder = out or f"out/bench-{datetime.now():%Y%m%d-%H%M%S}"
    check_out(folder, "bench")
    check_csv(csv)
    given = None if prompts is None else read_prompts(prompts, column=text)
    fixed = {"requests": requests, "out": folder, "workload": Workload(prompt_tokens, output_tokens, given)}
    if _is_address(target):
        settings = _settings(warmup, arrivals, max_seconds, remote, output)
        found = _measure_endpoint(target, remote, concurrency, settings=settings, **fixed)
    else:
        found = _measure_model(target, local, concurrency, warmup, max_seconds, output, **fixed)
    if not found.succeeded:
        raise _no_success(target, found, folder)
    data = {
        "run": folder,
        "stopped": found.meta["stopped"],
        "remarks": found.remarks(),
        "rows": rows_of(found.table()),
    }
    shown = f"{found!r}\nrun: {folder}"
    if csv is not None:
        written(found.table(), csv)
    if remote.sweep:
        table = knee(found)
        data["knee"] = rows_of(table)
        shown += f"\n\nknee: the load of the greatest power, tokens per second over median seconds\n{table.to_string()}"
    if slo is None:
        return Result(data, shown)
    met = found.goodput(slo)
    data["slo"] = rows_of(met)
    shown += f"\n\nrequests that meet {', '.join(f'{k} {v:g}' for k, v in slo.stated.items())}\n{met.to_string()}"
    return Result(data, shown, EXIT_DONE if (met["good_frac"] >= _MET).all() else EXIT_FAILED)


def _is_address(target: str) -> bool:
    from mixlens.endpoints.endpoint import PRESETS

    return "://" in target or target in PRESETS


def _given(options: Any) -> list[str]:
    given = [name for name, value in vars(options).items() if value is not None and value is not False]
    return [f"--{name.replace('_', '-')}" for name in given]


def _check(target: str, local: Local, remote: Remote, concurrency: tuple[int, ...] | None) -> None:
    """Raise BadInput for options that cannot be combined."""
    if _is_address(target):
        if given := _given(local):
            raise BadInput(
                f"Cannot measure {target} with {', '.join(given)}: this applies only to a model on this machine. "
                "Leave it out, or pass a Hub id or a folder.",
                argument=given[0],
            )
    elif given := _given(remote):
        raise BadInput(
            f"Cannot load and measure {target!r} with {', '.join(given)}: this applies only to an endpoint. Leave it "
            "out, or pass an address that begins with http.",
            argument=given[0],
        )
    if remote.sweep is not None and (concurrency or remote.rate):
        raise BadInput(
            f"Cannot combine --sweep {remote.sweep} with fixed loads: a sweep chooses its loads. Leave out "
            "--concurrency and --rate, or --sweep.",
            argument="--sweep",
            value=remote.sweep,
        )


def _settings(warmup: int, arrivals: str, max_seconds: float, remote: Remote, output: Output) -> Any:
    from mixlens.bench.run import BenchSettings

    return BenchSettings(
        warmup,
        arrivals,
        max_seconds=max_seconds,
        max_dollars=remote.max_dollars,
        price=remote.price,  # type: ignore[arg-type]  BenchSettings refuses any other number of prices
        progress=output.progress,
    )


def _measure_endpoint(target: str, remote: Remote, concurrency: tuple[int, ...] | None, **fixed: Any) -> Bench:
    from mixlens.bench.run import benchmark
    from mixlens.bench.sweep import load_sweep

    endpoint = remote.endpoint(target)
    if remote.sweep is not None:
        return load_sweep(endpoint, most=remote.sweep, **fixed)
    return benchmark(endpoint, concurrency=concurrency, rate=remote.rate, **fixed)


def _measure_model(
    target: str,
    local: Local,
    concurrency: tuple[int, ...] | None,
    warmup: int,
    max_seconds: float,
    output: Output,
    *,
    requests: int,
    out: str,
    workload: Workload,
) -> Bench:
    """Measure a model in every combination of the given dtypes and schemes."""
    import torch

    from mixlens.bench.configurations import benchmark_configurations
    from mixlens.bench.local_loads import LocalSettings, check_calls, check_loads, loads_of
    from mixlens.bench.run import benchmark
    from mixlens.models.load import load, skeleton

    place = local.device_map
    try:
        torch.device("cpu" if place is None or place in _SPREAD or place.isdigit() else place)
    except RuntimeError as error:
        raise BadInput(
            f"Cannot measure a model on {place!r}: torch knows no such device. Pass auto, cpu, cuda:0, or another "
            "device of torch.",
            argument="--device-map",
            value=place,
        ) from error
    settings = LocalSettings(
        warmup=warmup,
        experts=list(local.experts) if local.experts else None,
        static_cache=local.static_cache,
        compiled=local.compiled,
        recording=not local.no_recording,
        max_seconds=max_seconds,
        progress=output.progress,
    )
    fixed = {"requests": requests, "out": out, "workload": workload, "settings": settings, "concurrency": concurrency}
    check_calls(requests, settings)  # checked first, because loading may take long
    found = loads_of(concurrency, workload, settings)
    check_loads(skeleton(target), found)
    combined = [
        {"device_map": place, "dtype": dtype, "quantization": scheme}
        for dtype, scheme in product(local.dtype or [None], local.quantization or [None])
    ]
    if len(combined) > 1:
        return benchmark_configurations(target, combined, **fixed)
    return benchmark(load(target, verbose=output.progress, **combined[0]), **fixed)


def _no_success(target: str, found: Bench, folder: str) -> RunError:
    ended = found.outcomes().groupby("outcome")["n"].sum()
    detail = next((record.detail for record in found.records if record.detail), "")
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in ended.items()) or "none was sent"
    stopped = f", stopped by {found.meta['stopped']}" if found.meta["stopped"] else ""
    return RunError(
        f"Measured nothing at {target}: no measured request succeeded: {outcomes}{f' ({detail})' if detail else ''}"
        f"{stopped}. Every request is in {folder}/results.jsonl.",
        argument="requests",
    )
