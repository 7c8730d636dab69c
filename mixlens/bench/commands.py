"""The commands mixlens bench and mixlens cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from mixlens.errors import BadInput, RunError


def add_commands(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Declare both; `add` makes the parser of a command from its name, what runs it, and what it does."""
    bench = add("bench", _bench, "measure how fast an endpoint answers")
    bench.add_argument(
        "url", metavar="URL", help='as in http://127.0.0.1:8000/v1, or "openrouter", "deepinfra", "modelslab"'
    )
    bench.add_argument("--model", help="name that the server knows it by (may be left out for the three named)")
    bench.add_argument(
        "--protocol",
        choices=("openai-chat", "openai-completions", "anthropic", "modelslab"),
        help="(default: openai-chat)",
    )
    bench.add_argument("--key-env", metavar="NAME", help="environment variable that holds the key")
    bench.add_argument("--provider", metavar="NAME", help="of openrouter: only this one may answer")
    bench.add_argument("--concurrency", metavar="N,N,...", help="requests at a time (default: 1)")
    bench.add_argument("--rate", metavar="R,R,...", help="requests a second, whether or not the earlier ones are done")
    bench.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    bench.add_argument("--requests", type=int, default=32, help="measured requests a load (default: %(default)s)")
    bench.add_argument(
        "--warmup", type=int, default=1, help="requests before, for each at a time (default: %(default)s)"
    )
    bench.add_argument("--prompt-tokens", type=int, default=256, help="(default: %(default)s)")
    bench.add_argument("--output-tokens", type=int, default=128, help="at most (default: %(default)s)")
    bench.add_argument("--prompts", metavar="FILE", help="text file, one prompt a line, in place of made ones")
    bench.add_argument("--max-seconds", type=float, default=600.0, help="start nothing after (default: %(default)s)")
    bench.add_argument("--max-dollars", type=float, help="spend no more")
    bench.add_argument("--out", help="run directory (default: out/bench-DATE-TIME)")

    cost = add("cost", _cost, "say what a workload costs with each provider")
    cost.add_argument("--input-tokens", type=float, required=True, help="of one request")
    cost.add_argument("--output-tokens", type=float, required=True, help="of one request")
    cost.add_argument("--requests", type=float, default=1, help="a month (default: %(default)s)")
    cost.add_argument("--months", type=int, default=1, help="(default: %(default)s)")
    cost.add_argument("--growth", type=float, default=0.0, help="of requests from month to month, 0.1 for a tenth")
    cost.add_argument("--model", help="only this one")


def _bench(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.bench.prompts import Workload
    from mixlens.bench.run import BenchSettings, benchmark

    out = arguments.out or f"out/bench-{datetime.now():%Y%m%d-%H%M%S}"
    prompts = None if arguments.prompts is None else _lines(Path(arguments.prompts))
    bench = benchmark(
        _endpoint(arguments),
        concurrency=_numbers(arguments.concurrency, int),
        rate=_numbers(arguments.rate, float),
        requests=arguments.requests,
        out=out,
        workload=Workload(arguments.prompt_tokens, arguments.output_tokens, prompts),
        settings=BenchSettings(
            arguments.warmup,
            arguments.arrivals,
            max_seconds=arguments.max_seconds,
            max_dollars=arguments.max_dollars,
            progress=not arguments.json,
        ),
    )
    if not bench.succeeded:
        ended = bench.outcomes().groupby("outcome")["n"].sum()
        words = next((record.detail for record in bench.records if record.detail), "")
        found = ", ".join(f"{n} {outcome}" for outcome, n in ended.items()) or "none was sent"
        raise RunError(
            f"{arguments.url} was to be measured. No measured request succeeded: {found}"
            f"{f' ({words})' if words else ''}{_stopped(bench.meta)}. Every request is in {out}/results.jsonl."
        )
    if arguments.json:
        rows = json.loads(bench.table().to_json(orient="records"))
        return {"run": out, "stopped": bench.meta["stopped"], "remarks": bench.remarks(), "rows": rows}
    print(f"{bench!r}\nrun: {out}")
    return None


def _stopped(meta: dict[str, Any]) -> str:
    return f", stopped by {meta['stopped']}" if meta["stopped"] else ""


def _endpoint(arguments: argparse.Namespace) -> Any:
    from mixlens.models.endpoint import PRESETS, Endpoint

    names = ("model", "protocol", "key_env")
    fields = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.provider is not None and arguments.url != "openrouter":
        raise BadInput(
            f"The provider {arguments.provider!r} was asked for at {arguments.url}. Only OpenRouter chooses between "
            "providers. Give openrouter as the URL, or leave --provider out."
        )
    if arguments.url in PRESETS:
        pinned = {"providers": [arguments.provider]} if arguments.provider else {}
        return PRESETS[arguments.url](**fields, **pinned)
    if "model" not in fields:
        raise BadInput(
            f"{arguments.url} was to be measured. No model is named. Give --model NAME, as the server knows it."
        )
    return Endpoint(arguments.url, **fields)


def _cost(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.bench.prices import cost

    table = cost(
        arguments.input_tokens,
        arguments.output_tokens,
        requests=arguments.requests,
        model=arguments.model,
        months=arguments.months,
        growth=arguments.growth,
    )
    if arguments.json:
        return {"date": table.attrs["date"], "rows": json.loads(table.to_json(orient="records", double_precision=15))}
    shown = table.assign(
        usd_per_request=table["usd_per_request"].map("{:.5f}".format), usd=table["usd"].map("{:,.2f}".format)
    )
    print(shown.to_string(index=False))
    print(f"\nPrices as pages gave them, gathered {table.attrs['date']}; contradictions stand side by side.")
    return None


def _numbers(text: str | None, kind: type) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"A load of {text!r} was asked for. That is no list of numbers. Give it as 1,4,16.") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"Prompts were to be read from {path}. The file cannot be read: {error}. Give a text file in UTF-8 with "
            "one prompt a line."
        ) from error
