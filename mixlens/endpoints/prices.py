"""Published prices of providers of Mixtral, with date and source, and the cost of a workload with each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd

from mixlens.endpoints.endpoint import Endpoint, canonical
from mixlens.errors import BadInput

_MOST_MONTHS = 1_200
# Provider whose prices apply at each host.
_HOSTS = {"openrouter.ai": "OpenRouter", "api.deepinfra.com": "DeepInfra", "modelslab.com": "ModelsLab"}
# Columns of statements by a page or list about a provider's model; missing values are NaN and "".
STATEMENT = (
    "provider",
    "model",
    "output_tokens_per_s",
    "ttft_s",
    "input_usd_per_mtok",
    "output_usd_per_mtok",
    "usd_per_call",
    "context_tokens",
    "quantization",
    "parameters",
    "source",
    "as_of",
    "note",
)
WORDS = ("provider", "model", "quantization", "parameters", "source", "as_of", "note")


def prices(model: str | None = None) -> pd.DataFrame:
    """Return published prices, speeds and context lengths from the bundled snapshot.

    Contradicting statements about the same model are listed side by side.

    Parameters
    ----------
    model : str, optional
        Any name of a model. By default all models.

    Returns
    -------
    DataFrame
        One row per statement with the columns STATEMENT; missing values are NaN or "". attrs["date"] is the date of the
        snapshot.

    Raises
    ------
    BadInput
        If the snapshot does not contain the model.

    Examples
    --------
    >>> ml.pricing.prices().columns[:2].tolist()
    ['provider', 'model']
    """
    snapshot = json.loads((files("mixlens.endpoints") / "prices.json").read_text("utf-8"))
    frame = statements(snapshot["entries"])
    if model is not None:
        known = sorted(frame["model"].unique())
        frame = frame[frame["model"] == canonical(model)].reset_index(drop=True)
        if frame.empty:
            raise BadInput(
                f"Cannot find prices of {model!r}: the snapshot of {snapshot['date']} has {' and '.join(known)}. Pass "
                "one of these, or leave out the model to list all.",
                argument="model",
                value=model,
            )
    frame.attrs["date"] = snapshot["date"]
    return frame


def statements(rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """Return rows of statements as a frame with the columns STATEMENT."""
    frame = pd.DataFrame(rows, columns=list(STATEMENT))
    numbers = [name for name in STATEMENT if name not in WORDS]
    frame[numbers] = frame[numbers].astype(float)
    frame[list(WORDS)] = frame[list(WORDS)].astype(object).fillna("")
    return frame


def cost(
    input_tokens: float,
    output_tokens: float,
    *,
    requests: float = 1,
    model: str | None = None,
    months: int = 1,
    growth: float = 0.0,
    table: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Compute the monthly cost of a workload with every provider.

    usd = requests * (1 + growth) ** (month - 1) * (input tokens * input price + output tokens * output price), or with
    the price per call in place of the last factor.

    Parameters
    ----------
    input_tokens, output_tokens : float
        Tokens of one request.
    requests : float, optional
        Requests in the first month.
    model : str, optional
        Any name of a model. By default all models.
    months : int, optional
        Number of months.
    growth : float, optional
        Monthly growth of the requests; 0.1 is 10 %.
    table : pandas.DataFrame, optional
        Prices with any of the columns STATEMENT, such as those of `listed_prices`. By default the snapshot.

    Returns
    -------
    DataFrame
        One row per published price and month, with provider, model, month, requests, usd_per_request, usd, source and
        as_of. attrs["date"] is the date of the prices.

    Raises
    ------
    BadInput
        If a number is negative or infinite, `months` is below 1 or above 1,200, or the snapshot does not contain the
        model.

    Examples
    --------
    >>> ml.pricing.cost(1000, 500, months=2)["month"].max()
    np.int64(2)
    """
    numbers = np.array([input_tokens, output_tokens, requests, months - 1, growth + 1], float)
    with np.errstate(over="ignore"):
        last = requests * np.float64(1 + growth) ** max(months - 1, 0)
    if not (np.isfinite([*numbers, last]).all() and (numbers >= 0).all() and months <= _MOST_MONTHS):
        raise BadInput(
            f"Cannot compute the cost of {requests:g} requests of {input_tokens:g} input and {output_tokens:g} output "
            f"tokens over {months} months growing by {growth:g}: a number is out of range. Pass tokens and requests of "
            f"at least 0, months from 1 to {_MOST_MONTHS:,} and growth of at least -1.",
            argument="cost",
            value=(input_tokens, output_tokens, requests, months, growth),
        )
    table = prices(model) if table is None else table.reindex(columns=list(STATEMENT))
    per_tokens = (input_tokens * table["input_usd_per_mtok"] + output_tokens * table["output_usd_per_mtok"]) / 1e6
    table["usd_per_request"] = per_tokens.fillna(table["usd_per_call"])
    parts = []
    for month in range(1, months + 1):
        part = table.assign(month=month, requests=requests * (1 + growth) ** (month - 1))
        parts.append(part.assign(usd=part["requests"] * part["usd_per_request"]))
    columns = ["provider", "model", "month", "requests", "usd_per_request", "usd", "source", "as_of"]
    result = pd.concat(parts, ignore_index=True)[columns]
    result.attrs["date"] = table.attrs.get("date", "")
    return result


def provider_at(url: str) -> str:
    """Return the provider whose prices apply at an address; the host if the snapshot has no such provider."""
    host = urlsplit(url).hostname or ""
    return _HOSTS.get(host, host)


def price_at(endpoint: Endpoint) -> tuple[float, float] | None:
    """Return the highest published dollars per million input and output tokens at an endpoint; None if unknown."""
    provider = provider_at(endpoint.url)
    table = prices()
    known = table[(table["provider"] == provider) & (table["model"] == canonical(endpoint.model))]
    known = known.dropna(subset=["input_usd_per_mtok", "output_usd_per_mtok"])
    if known.empty:
        return None
    return float(known["input_usd_per_mtok"].max()), float(known["output_usd_per_mtok"].max())
