"""The commands `probe`, `models`, `providers` and `cost`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from cyclopts import Parameter

from mixlens.cli.app import Result, app
from mixlens.cli.options import Names, Output, Positive, Server
from mixlens.cli.tables import rows_of, written
from mixlens.errors import BadInput


@app.command
def probe(
    url: str,
    /,
    *,
    parameters: Names | None = None,
    out: str | None = None,
    server: Server = Server(),
    output: Output = Output(),
) -> Result:
    """Test which parameters an endpoint honours, ignores or rejects.

    Parameters
    ----------
    url
        URL such as http://127.0.0.1:8000/v1, or openrouter, deepinfra or modelslab.
    parameters
        Only these parameters.
    out
        JSON Lines file for the verdicts and every exchange.
    """
    from mixlens.endpoints.probe import PARAMETERS, probe

    found = probe(server.endpoint(url), parameters=PARAMETERS if parameters is None else list(parameters), out=out)
    return Result({**found.meta, "rows": rows_of(found.table)}, str(found))


@app.command
def models(url: str, /, *, server: Server = Server(), output: Output = Output()) -> Result:
    """List the models of an endpoint.

    Parameters
    ----------
    url
        URL such as http://127.0.0.1:8000/v1, or openrouter, deepinfra or modelslab.
    """
    found = replace(server, model=server.model or "-").endpoint(url).models()
    return Result({"models": found}, "\n".join(str(model["id"]) for model in found))


@app.command
def providers(
    runs: Annotated[list[str] | None, Parameter(metavar="NAME=RUN")] = None,
    /,
    *,
    model: str = "mistralai/mixtral-8x7b-instruct",
    probe: Annotated[list[str] | None, Parameter(metavar="NAME=FILE")] = None,
    live: bool = False,
    csv: str | None = None,
    output: Output = Output(),
) -> Result:
    """Compare speed, price and context of providers, with source and date.

    Parameters
    ----------
    runs
        Runs of mixlens bench, one per provider.
    model
        Model that they serve.
    probe
        File of mixlens probe for a provider. Repeatable.
    live
        Also read the current public list of OpenRouter.
    csv
        Write the table to this file instead of printing it.
    """
    from mixlens.bench.bench import Bench
    from mixlens.endpoints.probe import Probe
    from mixlens.pricing.providers import listed_prices, provider_table

    measured = {name: Bench.open(path) for name, path in map(_named, runs or [])}
    probes = {name: Probe.open(path) for name, path in map(_named, probe or [])}
    if unknown := [name for name in probes if name not in measured]:
        raise BadInput(
            f"Cannot show the probe of {unknown[0]!r}: no run has this name. Also pass {unknown[0]}=RUN.",
            argument="runs",
            value=unknown[0],
        )
    table = provider_table(measured, model=model, listed=listed_prices(model) if live else None, probes=probes)
    if csv:
        return written(table, csv)
    return Result({"date": table.attrs["date"], "rows": rows_of(table)}, _provider_text(table))


@app.command
def cost(
    *,
    input_tokens: float,
    output_tokens: float,
    requests: float = 1,
    months: Positive = 1,
    growth: float = 0.0,
    model: str | None = None,
    live: bool = False,
    output: Output = Output(),
) -> Result:
    """Calculate the cost of a workload with each provider.

    Parameters
    ----------
    input_tokens
        Input tokens per request.
    output_tokens
        Output tokens per request.
    requests
        Requests per month.
    months
        Number of months.
    growth
        Monthly growth of the requests; 0.1 is 10 %.
    model
        Only this model.
    live
        Read the prices from the current public list of OpenRouter; requires --model.
    """
    from mixlens.endpoints.prices import cost
    from mixlens.pricing.providers import listed_prices

    if live and model is None:
        raise BadInput(
            "Cannot read current prices: they are listed by model, and none is given. Pass --model NAME.",
            argument="--model",
        )
    table = cost(
        input_tokens,
        output_tokens,
        requests=requests,
        model=model,
        months=months,
        growth=growth,
        table=listed_prices(model) if live and model else None,
    )
    date = table.attrs["date"]
    note = f"Prices as pages gave them, gathered {date}; contradicting statements are listed side by side."
    return Result({"date": date, "rows": rows_of(table)}, f"{_cost_text(table)}\n\n{note}")


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise BadInput(
            f"Cannot show {text!r}: it does not name a provider. Write NAME=RUN, or NAME=FILE for a probe.",
            argument="runs",
            value=text,
        )
    return name, path


def _provider_text(table: Any) -> str:
    """Format the numbers as columns, without empty ones, followed by their sources and dates."""
    from mixlens.core.text import interval

    shown = table[["provider", "kind", "load"]].copy()
    for heading, column, factor, decimals in (
        ("tok/s", "output_tokens_per_s", 1, 1),
        ("TTFT [ms]", "ttft_s", 1e3, 0),
    ):
        columns = [column, f"{column}_low", f"{column}_high"]
        shown[heading] = [
            interval(estimate, low, high, decimals, factor=factor)
            for estimate, low, high in table[columns].to_numpy(float)
        ]
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


def _cost_text(table: Any) -> str:
    """Format the dollars per month, one line per published price, followed by their sources and dates."""
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
