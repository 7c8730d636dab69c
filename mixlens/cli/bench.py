"""The commands mixlens bench, probe, providers, models and cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from mixlens.cli.bench_local import (
    add_local_arguments,
    check_endpoint_arguments,
    is_address,
    measured_here,
    numbers_of,
)
from mixlens.errors import BadInput, RunError


def add_commands(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Declare them; `add` makes the parser of a command from its name, what runs it, and what it does."""
    bench = add("bench", _bench, "measure how fast an endpoint answers, or a model generates here")
    _endpoint_arguments(bench)
    add_local_arguments(bench)
    bench.add_argument("--concurrency", metavar="N,N,...", help="requests at a time (default: 1)")
    bench.add_argument(
        "--sweep", type=int, metavar="N", help="concurrencies 1, 2, 4 ... up to N, until more brings only waiting"
    )
    bench.add_argument("--rate", metavar="R,R,...", help="requests a second, whether or not the earlier ones are done")
    bench.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    bench.add_argument("--requests", type=int, default=32, help="measured requests a load (default: %(default)s)")
    bench.add_argument(
        "--warmup", type=int, default=1, help="requests before, for each at a time (default: %(default)s)"
    )
    bench.add_argument("--prompt-tokens", type=int, default=256, help="(default: %(default)s)")
    bench.add_argument("--output-tokens", type=int, default=128, help="at most (default: %(default)s)")
    bench.add_argument("--prompts", metavar="FILE", help="text file, one prompt a line, or JSON Lines")
    bench.add_argument("--text", default="text", metavar="COLUMN", help="text column of JSON Lines (default: text)")
    bench.add_argument("--max-seconds", type=float, default=600.0, help="start nothing after (default: %(default)s)")
    bench.add_argument("--max-dollars", type=float, help="spend no more")
    bench.add_argument("--price", metavar="IN,OUT", help="dollars per million tokens (default: the snapshot's)")
    bench.add_argument("--out", help="run directory (default: out/bench-DATE-TIME)")

    probe = add("probe", _probe, "tell which parameters an endpoint honours, ignores or rejects")
    _endpoint_arguments(probe)
    probe.add_argument("--parameters", metavar="NAME,NAME,...", help="only these")
    probe.add_argument("--out", metavar="FILE", help="JSON Lines of the verdicts and of every exchange")

    models = add("models", _models, "list the models of an endpoint")
    _endpoint_arguments(models)

    providers = add("providers", _providers, "compare providers: speed, price, context, by source and date")
    providers.add_argument("runs", nargs="*", metavar="NAME=RUN", help="what mixlens bench measured, by provider")
    providers.add_argument("--model", default="mistralai/mixtral-8x7b-instruct", help="(default: %(default)s)")
    providers.add_argument(
        "--probe",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="what mixlens probe wrote; can be repeated",
    )
    providers.add_argument("--live", action="store_true", help="also ask OpenRouter's public list now")
    providers.add_argument("--csv", metavar="FILE", help="write the table there instead")

    cost = add("cost", _cost, "say what a workload costs with each provider")
    cost.add_argument("--input-tokens", type=float, required=True, help="of one request")
    cost.add_argument("--output-tokens", type=float, required=True, help="of one request")
    cost.add_argument("--requests", type=float, default=1, help="a month (default: %(default)s)")
    cost.add_argument("--months", type=int, default=1, help="(default: %(default)s)")
    cost.add_argument("--growth", type=float, default=0.0, help="of requests from month to month, 0.1 for a tenth")
    cost.add_argument("--model", help="only this one")
    cost.add_argument("--live", action="store_true", help="prices of OpenRouter's public list now, of --model")


def _endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        metavar="URL",
        help='as in http://127.0.0.1:8000/v1, or "openrouter", "deepinfra", "modelslab"; for bench also a model to '
        'measure here: a Hub id, a folder, or "demo"',
    )
    parser.add_argument("--model", help="name that the server knows it by (may be left out for the three named)")
    parser.add_argument(
        "--protocol",
        choices=("openai-chat", "openai-completions", "anthropic", "modelslab"),
        help="(default: openai-chat)",
    )
    parser.add_argument("--key-env", metavar="NAME", help="environment variable that holds the key")
    parser.add_argument("--provider", metavar="NAME", help="of openrouter: only this one may answer")


def _bench(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.bench.knee import knee, load_sweep
    from mixlens.bench.prompts import Workload, read_prompts
    from mixlens.bench.run import benchmark

    out = arguments.out or f"out/bench-{datetime.now():%Y%m%d-%H%M%S}"
    prompts = None if arguments.prompts is None else read_prompts(arguments.prompts, column=arguments.text)
    workload = Workload(arguments.prompt_tokens, arguments.output_tokens, prompts)
    if not is_address(arguments.url):
        bench = measured_here(arguments, out, workload)
    else:
        check_endpoint_arguments(arguments)
        fixed = {"requests": arguments.requests, "out": out, "workload": workload, "settings": _settings(arguments)}
        if arguments.sweep is not None:
            if arguments.concurrency or arguments.rate:
                raise BadInput(
                    f"A sweep up to {arguments.sweep} was asked for, and fixed loads too. A sweep chooses its loads. "
                    "Leave out --concurrency and --rate, or --sweep.",
                    argument="--sweep",
                    value=arguments.sweep,
                )
            bench = load_sweep(_endpoint(arguments), most=arguments.sweep, **fixed)
        else:
            loads = {
                "concurrency": numbers_of(arguments.concurrency, int),
                "rate": numbers_of(arguments.rate, float),
            }
            bench = benchmark(_endpoint(arguments), **loads, **fixed)
    if not bench.succeeded:
        ended = bench.outcomes().groupby("outcome")["n"].sum()
        words = next((record.detail for record in bench.records if record.detail), "")
        found = ", ".join(f"{n} {outcome}" for outcome, n in ended.items()) or "none was sent"
        raise RunError(
            f"{arguments.url} was to be measured. No measured request succeeded: {found}"
            f"{f' ({words})' if words else ''}{_stopped(bench.meta)}. Every request is in {out}/results.jsonl.",
            argument="requests",
        )
    if arguments.json:
        rows = _rows(bench.table())
        found = {"run": out, "stopped": bench.meta["stopped"], "remarks": bench.remarks(), "rows": rows}
        return found | ({"knee": _rows(knee(bench))} if arguments.sweep else {})
    print(f"{bench!r}\nrun: {out}")
    if arguments.sweep:
        print(f"\nknee: the load of the greatest power, tokens a second over median seconds\n{knee(bench).to_string()}")
    return None


def _settings(arguments: argparse.Namespace) -> Any:
    from mixlens.bench.run import BenchSettings

    return BenchSettings(
        arguments.warmup,
        arguments.arrivals,
        max_seconds=arguments.max_seconds,
        max_dollars=arguments.max_dollars,
        price=None if arguments.price is None else tuple(numbers_of(arguments.price, float, "A price") or ()),
        progress=not arguments.json,
    )


def _stopped(meta: dict[str, Any]) -> str:
    return f", stopped by {meta['stopped']}" if meta["stopped"] else ""


def _endpoint(arguments: argparse.Namespace) -> Any:
    from mixlens.endpoints.endpoint import PRESETS, Endpoint

    names = ("model", "protocol", "key_env")
    fields = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.provider is not None and arguments.url != "openrouter":
        raise BadInput(
            f"The provider {arguments.provider!r} was asked for at {arguments.url}. Only OpenRouter chooses between "
            "providers. Give openrouter as the URL, or leave --provider out.",
            argument="--provider",
            value=arguments.provider,
        )
    if arguments.url in PRESETS:
        pinned = {"providers": [arguments.provider]} if arguments.provider else {}
        return PRESETS[arguments.url](**fields, **pinned)
    if "model" not in fields:
        raise BadInput(
            f"{arguments.url} was to be measured. No model is named. Give --model NAME, as the server knows it.",
            argument="--model",
        )
    return Endpoint(arguments.url, **fields)


def _rows(frame: Any) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records", double_precision=15))


def _probe(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.endpoints.probe import PARAMETERS, probe

    names = PARAMETERS if arguments.parameters is None else arguments.parameters.split(",")
    found = probe(_endpoint(arguments), parameters=names, out=arguments.out)
    if arguments.json:
        return {**found.meta, "rows": _rows(found.table)}
    print(found)
    return None


def _models(arguments: argparse.Namespace) -> dict[str, Any] | None:
    arguments.model = arguments.model or "-"
    found = _endpoint(arguments).models()
    if arguments.json:
        return {"models": found}
    print("\n".join(str(model["id"]) for model in found))
    return None


def _providers(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.bench.bench import Bench
    from mixlens.endpoints.probe import Probe
    from mixlens.pricing.providers import listed_prices, provider_table

    measured = {name: Bench.open(path) for name, path in map(_named, arguments.runs)}
    probes = {name: Probe.open(path) for name, path in map(_named, arguments.probe)}
    if unknown := [name for name in probes if name not in measured]:
        raise BadInput(
            f"A probe of {unknown[0]!r} was to stand in the table of providers. No run is given for that name. Give "
            f"{unknown[0]}=RUN too.",
            argument="runs",
            value=unknown[0],
        )
    listed = listed_prices(arguments.model) if arguments.live else None
    table = provider_table(measured, model=arguments.model, listed=listed, probes=probes)
    if arguments.csv:
        try:
            table.to_csv(arguments.csv, index=False)
        except OSError as error:
            raise BadInput(
                f"The table of providers was to be written to {arguments.csv}. That cannot be done: {error}. Give a "
                "file in a folder that is there.",
                argument="--csv",
                value=arguments.csv,
            ) from error
        return {"written": arguments.csv, "rows": len(table)}
    if arguments.json:
        return {"date": table.attrs["date"], "rows": _rows(table)}
    print(_provider_text(table))
    return None


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise BadInput(
            f"{text!r} was to stand in the table of providers. It does not say whose it is. Give NAME=RUN, or for a "
            "probe NAME=FILE.",
            argument="runs",
            value=text,
        )
    return name, path


def _provider_text(table: Any) -> str:
    """Numbers of every row in columns, of which those without any are left out; then who said them, and when."""
    shown = table[["provider", "kind", "load"]].copy()
    for heading, column, factor, decimals in (
        ("tok/s", "output_tokens_per_s", 1, 1),
        ("TTFT [ms]", "ttft_s", 1e3, 0),
    ):
        columns = [column, f"{column}_low", f"{column}_high"]
        shown[heading] = [_interval(factor * row, decimals) for row in table[columns].to_numpy(float)]
    names = {
        "input_usd_per_mtok": "$/Mtok in",
        "output_usd_per_mtok": "$/Mtok out",
        "usd_per_call": "$/call",
        "list_usd_per_mtok": "$/Mtok listed",
        "charged_usd_per_mtok": "$/Mtok charged",
        "context_tokens": "context",
    }
    for column, heading in names.items():
        shown[heading] = ["n/a" if value != value else f"{value:,.6g}" for value in table[column]]
    shown = shown.assign(quantization=table["quantization"], parameters=table["parameters"], n=table["n"])
    empty = [name for name in shown.columns if shown[name].isin(("", "n/a")).all()]
    shown.index = range(1, len(shown) + 1)
    said = [
        f"{at}. {'; '.join(filter(None, (row['source'], row['as_of'], row['note'])))}"
        + (f". Contradicted: {row['contradicted']}" if row["contradicted"] else "")
        for at, row in enumerate(table.to_dict("records"), 1)
    ]
    return "\n".join([*dict.fromkeys(table["model"]), shown.drop(columns=empty).to_string(), "", *said])


def _interval(numbers: Sequence[float], decimals: int) -> str:
    estimate, low, high = numbers
    if estimate != estimate:
        return "n/a"
    return f"{estimate:.{decimals}f}" + ("" if low != low else f" [{low:.{decimals}f}, {high:.{decimals}f}]")


def _cost(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.endpoints.prices import cost
    from mixlens.pricing.providers import listed_prices

    if arguments.live and arguments.model is None:
        raise BadInput(
            "Prices of now were asked for. They are listed by model, and none is named. Give --model NAME.",
            argument="--model",
        )

    table = cost(
        arguments.input_tokens,
        arguments.output_tokens,
        requests=arguments.requests,
        model=arguments.model,
        months=arguments.months,
        growth=arguments.growth,
        table=listed_prices(arguments.model) if arguments.live else None,
    )
    if arguments.json:
        return {"date": table.attrs["date"], "rows": _rows(table)}
    print(_cost_text(table))
    print(f"\nPrices as pages gave them, gathered {table.attrs['date']}; contradictions stand side by side.")
    return None


def _cost_text(table: Any) -> str:
    """Dollars of every month, one line a statement of a price; then who stated it, and when."""
    first = table[table["month"] == 1]
    shown = first[["provider", "model"]].assign(**{"$/request": first["usd_per_request"].map("{:.5f}".format)})
    months = {f"month {month}": part["usd"].to_numpy() for month, part in table.groupby("month")}
    if len(months) > 1:
        months["in all"] = sum(months.values())
    for heading, usd in months.items():
        shown[heading] = ["n/a" if value != value else f"${value:,.{2 if value >= 1 else 5}f}" for value in usd]
    shown.index = range(1, len(shown) + 1)
    said = [f"{at}. {row['source']}; {row['as_of']}" for at, row in enumerate(first.to_dict("records"), 1)]
    return "\n".join([shown.to_string(), "", *said])
