"""What providers charge for Mixtral, as their pages said on a date, and what a workload costs with each."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pandas as pd

from mixlens.errors import BadInput
from mixlens.models.endpoint import Endpoint, canonical

# Whose prices hold at which host.
_HOSTS = {"openrouter.ai": "OpenRouter", "api.deepinfra.com": "DeepInfra", "modelslab.com": "ModelsLab"}
_NUMBERS = (
    "input_usd_per_mtok",
    "output_usd_per_mtok",
    "usd_per_call",
    "output_tokens_per_s",
    "ttft_s",
    "context_tokens",
)
_WORDS = ("quantization", "source", "as_of", "note")


def prices(model: str | None = None) -> pd.DataFrame:
    """What pages said of prices, speeds and contexts: one row a statement, contradictions side by side.

    model  any of its names; None for all models

    Returns  DataFrame  provider, model, input_usd_per_mtok, output_usd_per_mtok, usd_per_call, output_tokens_per_s,
                        ttft_s, context_tokens, quantization, source, as_of, note; NaN where a page says nothing;
                        attrs["date"] is the date of the snapshot
    Raises   BadInput   for a model that the snapshot does not have
    """
    snapshot = json.loads((files("mixlens.bench") / "prices.json").read_text("utf-8"))
    frame = pd.DataFrame(snapshot["entries"], columns=["provider", "model", *_NUMBERS, *_WORDS])
    frame[list(_NUMBERS)] = frame[list(_NUMBERS)].astype(float)
    frame[list(_WORDS)] = frame[list(_WORDS)].fillna("")
    if model is not None:
        known = sorted(frame["model"].unique())
        frame = frame[frame["model"] == canonical(model)].reset_index(drop=True)
        if frame.empty:
            raise BadInput(
                f"Prices of {model!r} were asked for. The snapshot of {snapshot['date']} has {' and '.join(known)}. "
                "Give one of these, or leave the model out for all."
            )
    frame.attrs["date"] = snapshot["date"]
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
    """What a workload costs with every provider, month by month.

    input_tokens, output_tokens  of one request
    requests                     in the first month
    months                       how many months
    growth                       of the requests from month to month, 0.1 for a tenth more
    table                        prices to reckon with, as from providers.listed_prices; None for the snapshot

    usd = requests * ((1 + growth) ** (month - 1)) * (tokens in * price in + tokens out * price out, or price a call)

    Returns  DataFrame  provider, model, month, requests, usd_per_request, usd, source, as_of; one row a statement of a
                        price and month; attrs["date"]
    Raises   BadInput   for numbers below 0, no month, or a model that the snapshot does not have
    """
    numbers = np.array([input_tokens, output_tokens, requests, months - 1, growth + 1], float)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise BadInput(
            f"The cost of {requests:g} requests of {input_tokens:g} tokens in and {output_tokens:g} out over {months} "
            f"months growing by {growth:g} was asked for. One of the numbers is negative, or there is no month. "
            "Give tokens and requests from 0, months from 1, growth from -1."
        )
    table = prices(model) if table is None else table.copy()
    per_tokens = (input_tokens * table["input_usd_per_mtok"] + output_tokens * table["output_usd_per_mtok"]) / 1e6
    table["usd_per_request"] = per_tokens.fillna(table["usd_per_call"])
    parts = []
    for month in range(1, months + 1):
        part = table.assign(month=month, requests=requests * (1 + growth) ** (month - 1))
        parts.append(part.assign(usd=part["requests"] * part["usd_per_request"]))
    columns = ["provider", "model", "month", "requests", "usd_per_request", "usd", "source", "as_of"]
    result = pd.concat(parts, ignore_index=True)[columns]
    result.attrs["date"] = table.attrs["date"]
    return result


def price_at(endpoint: Endpoint) -> tuple[float, float] | None:
    """Dollars per million tokens in and out at an endpoint: the dearest statement of the snapshot, None without one."""
    provider = _HOSTS.get(endpoint.host)
    table = prices()
    known = table[(table["provider"] == provider) & (table["model"] == canonical(endpoint.model))]
    known = known.dropna(subset=["input_usd_per_mtok", "output_usd_per_mtok"])
    if known.empty:
        return None
    return float(known["input_usd_per_mtok"].max()), float(known["output_usd_per_mtok"].max())
