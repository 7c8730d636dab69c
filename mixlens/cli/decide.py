"""The command `decide`, which chooses a form of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mixlens.cli.app import EXIT_DONE, EXIT_FAILED, Result, app
from mixlens.cli.options import Output
from mixlens.cli.tables import check_csv, rows_of, written
from mixlens.errors import BadInput

Limits = Annotated[list[str] | None, Parameter(metavar="QUANTITY=VALUE")]


@app.command
def decide(
    runs: Annotated[list[str], Parameter(metavar="RUN|NAME=RUN")],
    /,
    *,
    max: Limits = None,
    min: Limits = None,
    max_memory: str | None = None,
    max_ttft: str | None = None,
    max_price: str | None = None,
    usd_per_hour: Annotated[list[str] | None, Parameter(metavar="USD|MACHINE=USD")] = None,
    prefer: str | None = None,
    baseline: str | None = None,
    csv: str | None = None,
    output: Output = Output(),
) -> Result:
    """Decide which form of a model to use: quantization scheme, pruning or provider.

    The exit status is 0 if a form meets every limit, and 1 if none does.

    Parameters
    ----------
    runs
        Recordings, evaluations, benchmarks, impact runs, pareto runs and judgements of the forms of one model. By
        naming a run you assert that its form is an alternative.
    max
        Upper limit such as kl=0.05 or weight_bytes=8GB, or relative to the baseline as in perplexity=+2%. Repeatable.
    min
        Lower limit such as mmlu=70%, or relative to the baseline as in mmlu=-1%, one percentage point. Repeatable.
    max_memory
        Maximum peak memory of a benchmark, such as 24GB.
    max_ttft
        Maximum median time to the first token, such as 0.5 or 500ms.
    max_price
        Maximum price in dollars per million tokens of a benchmark's workload.
    usd_per_hour
        Hourly price in dollars of a benchmark's machine with all its GPUs, such as 2.5. The price per token follows
        from the measured throughput. For several machines write MACHINE=2.5, by name or address. Repeatable.
    prefer
        Quantity that decides between the forms that qualify.
    baseline
        Form that relative limits refer to. By default the first.
    csv
        Also write the table to this file.
    """
    from mixlens.choice import decide

    check_csv(csv)
    named = {"memory_bytes": max_memory, "ttft_s": max_ttft, "usd_per_mtok": max_price}
    at_most = _limits("--max", max or []) | {name: value for name, value in named.items() if value is not None}
    claims: dict[str | None, list[str]] = {}
    for text in runs:
        name, _, run = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
        claims.setdefault(name or None, []).append(run)
    found = decide(
        claims,
        at_most=at_most,
        at_least=_limits("--min", min or []),
        prefer=prefer,
        baseline=baseline,
        usd_per_hour=_hourly(usd_per_hour or []),
    )
    if csv is not None:
        written(found.table, csv)
    data = {
        "recommended": found.recommended,
        "reason": found.reason,
        "qualifying": found.qualifying,
        "frontier": found.frontier,
        "objectives": found.objectives,
        "answers": rows_of(found.answers.reset_index()),
        "rows": rows_of(found.table),
        "remarks": found.remarks,
    }
    return Result(data, repr(found), EXIT_DONE if found.recommended is not None else EXIT_FAILED)


def _limits(option: str, given: Sequence[str]) -> dict[str, str]:
    pairs = [one.rpartition("=") for one in given]
    if wrong := [one for one, (name, _, value) in zip(given, pairs, strict=True) if not (name and value)]:
        raise BadInput(
            f"Cannot use {option} {wrong[0]}: the quantity or the value is missing. Write it as in {option} kl=0.05.",
            argument=option,
            value=wrong[0],
        )
    return {name: value for name, _, value in pairs}


def _hourly(given: Sequence[str]) -> float | dict[str, float] | None:
    """Return one price for all machines or one per named machine. Raises BadInput for anything but a price."""
    pairs = [one.rpartition("=") for one in given]
    try:
        prices = {name: float(usd) for name, _, usd in pairs}
    except ValueError:
        prices = {}
    if len(prices) < len(given) or ("" in prices and len(prices) > 1):
        raise BadInput(
            f"Cannot use --usd-per-hour {' '.join(given)}: expected one price, or one for each machine. Write it as in "
            "--usd-per-hour 2.5, or --usd-per-hour NAME=2.5 --usd-per-hour OTHER=4.",
            argument="--usd-per-hour",
            value=list(given),
        )
    return prices.get("", prices or None)
