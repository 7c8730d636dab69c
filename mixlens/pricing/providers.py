"""Comparison of providers: current listings, published prices, and benchmarks measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixlens.bench.bench import Bench
from mixlens.core.run_dir import now
from mixlens.endpoints.calls import get_json
from mixlens.endpoints.endpoint import Endpoint, canonical
from mixlens.endpoints.prices import STATEMENT, WORDS, prices, statements
from mixlens.endpoints.probe import Probe
from mixlens.errors import BadInput, EndpointError

OPENROUTER = "https://openrouter.ai/api/v1"
# Columns added to those of a statement, by the column that they follow.
_BESIDE = {
    "model": ("kind", "load"),
    "output_tokens_per_s": ("output_tokens_per_s_low", "output_tokens_per_s_high"),
    "ttft_s": ("ttft_s_low", "ttft_s_high"),
    "usd_per_call": ("list_usd_per_mtok", "charged_usd_per_mtok"),
    "as_of": ("n",),
    "note": ("contradicted",),
}
COLUMNS = tuple(column for said in STATEMENT for column in (said, *_BESIDE.get(said, ())))
_NUMBERS = [name for name in COLUMNS if name not in (*WORDS, "kind", "load", "n", "contradicted")]
# Columns in which two statements of one provider can contradict each other.
_STATED = ("input_usd_per_mtok", "output_usd_per_mtok", "context_tokens", "output_tokens_per_s", "ttft_s")


def listed_prices(model: str, *, url: str = OPENROUTER) -> pd.DataFrame:
    """Return OpenRouter's public price list, with one row per provider that serves the model. Needs no key.

    The list gives prices as strings in dollars per token; they are returned per million tokens. Discounts are noted but
    not subtracted. Latency and throughput are omitted: they need a key, and the documentation of their units is
    inconsistent.

    Parameters
    ----------
    model : str
        Any name of the model.
    url : str, optional
        Address of the list.

    Returns
    -------
    DataFrame
        Columns of prices.STATEMENT, NaN for an invalid price; the date is in attrs["date"].

    Raises
    ------
    EndpointError
        If there is no list, or its format is unknown.

    Examples
    --------
    >>> ml.pricing.listed_prices("mistralai/mixtral-8x7b-instruct")  # doctest: +SKIP
    """
    name = canonical(model)
    data = get_json(Endpoint(f"{url}/models/{name}/endpoints", model=name))
    rows = (
        data.get("data", {}).get("endpoints") if isinstance(data, dict) and isinstance(data.get("data"), dict) else None
    )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EndpointError(
            f"Cannot read prices of {name} from {url}: the answer has no list of endpoints. Use the snapshot instead.",
            argument="answer",
            value=url,
        )
    date = now()
    frame = statements([_listed(row, name, date) for row in rows])
    frame.attrs["date"] = date
    return frame


def _listed(row: Mapping[str, Any], model: str, date: str) -> dict[str, Any]:
    pricing = row.get("pricing") if isinstance(row.get("pricing"), dict) else {}
    assert isinstance(pricing, dict)
    per_call = _dollars(pricing.get("request"))
    notes = [f"discount {pricing['discount']}" if pricing.get("discount") else ""]
    notes.append(
        f"uptime {row['uptime_last_30m']:.1f} %" if isinstance(row.get("uptime_last_30m"), int | float) else ""
    )
    return {
        "provider": str(row.get("provider_name") or row.get("name") or "not named"),
        "model": model,
        "input_usd_per_mtok": 1e6 * _dollars(pricing.get("prompt")),
        "output_usd_per_mtok": 1e6 * _dollars(pricing.get("completion")),
        "usd_per_call": per_call if per_call else np.nan,
        "context_tokens": float(row["context_length"]) if isinstance(row.get("context_length"), int) else np.nan,
        "quantization": str(row.get("quantization") or ""),
        "parameters": ", ".join(map(str, row.get("supported_parameters") or [])),
        "source": "OpenRouter's list of endpoints",
        "as_of": date,
        "note": "; ".join(note for note in notes if note),
    }


def _dollars(value: Any) -> float:
    """Parse a price per token, given as a string; NaN if invalid, or -1, which means that the price varies."""
    try:
        price = float(value)
    except (TypeError, ValueError):
        return math.nan
    return price if 0 <= price < math.inf else math.nan


def provider_table(
    measured: Mapping[str, Bench] | None = None,
    *,
    model: str | None = None,
    listed: pd.DataFrame | None = None,
    probes: Mapping[str, Probe] | None = None,
) -> pd.DataFrame:
    """Tabulate the providers of a model: measured first, then listed now, then as published. Sources are not averaged.

    `charged_usd_per_mtok` is the amount billed for the measured requests, as reported by the server, in dollars per
    million input and output tokens together; `list_usd_per_mtok` is the cost of the same tokens at the price that the
    run used. `contradicted` names the columns in which statements of one provider differ, with all values.

    Parameters
    ----------
    measured : Mapping[str, Bench], optional
        Benchmarks by provider name; one row per load, with the medians of output speed and TTFT per request.
    model : str, optional
        Any name of the model; None for all models.
    listed : pandas.DataFrame, optional
        Result of `listed_prices`.
    probes : Mapping[str, Probe], optional
        Probes by the same names as `measured`, for the column of honoured parameters.

    Returns
    -------
    DataFrame
        COLUMNS; NaN and "" if a source lacks the value; n is 0 for a published figure.

    Raises
    ------
    BadInput
        If the snapshot does not have the model.

    Examples
    --------
    >>> ml.pricing.provider_table({}, model="mistralai/mixtral-8x7b-instruct")["kind"].unique().tolist()
    ['published']
    """
    published = prices(model)
    rows = [row for name, bench in (measured or {}).items() for row in _measured(name, bench, (probes or {}).get(name))]
    parts = [pd.DataFrame(rows, columns=list(COLUMNS)).assign(kind="measured")] if rows else []
    if listed is not None:
        parts.append(listed.assign(kind="listed", n=0))
    parts.append(published.assign(kind="published", n=0))
    frame = pd.concat([part.reindex(columns=list(COLUMNS)) for part in parts], ignore_index=True)
    frame[_NUMBERS] = frame[_NUMBERS].astype(float)
    words = [*WORDS, "load"]
    frame[words] = frame[words].astype(object).fillna("")
    frame["contradicted"] = _contradictions(frame)
    frame.attrs["date"] = published.attrs["date"]
    return frame


def _measured(name: str, bench: Bench, probe: Probe | None) -> list[dict[str, Any]]:
    levels = list(dict.fromkeys(r.level for r in bench.records if r.phase == "measured"))
    if not levels or "endpoint" not in bench.meta:
        found = "it is of a model on this machine" if levels else "it has no measured request"
        raise BadInput(
            f"Cannot compare providers by the benchmark of {name!r}: {found}. Leave it out.",
            argument="runs",
            value=name,
        )
    medians, requests = bench.table().query("statistic == 'p50'"), bench.requests().query("phase == 'measured'")
    honoured = [] if probe is None else [name for name, verdict in probe.verdicts.items() if verdict == "honoured"]
    rows = []
    for level in levels:
        table = medians[medians["level"] == level].set_index("metric")
        part = requests[requests["level"] == level]
        row: dict[str, Any] = {"provider": name, "model": canonical(bench.meta["endpoint"]["model"]), "load": level}
        for metric in ("output_tokens_per_s", "ttft_s"):
            cell = table.loc[metric]
            row |= {metric: cell["estimate"], f"{metric}_low": cell["ci_low"], f"{metric}_high": cell["ci_high"]}
        prices, notes = _charged(part, bench.meta.get("price_usd_per_mtok"))
        answered = dict.fromkeys(p for p in part["provider"] if isinstance(p, str))
        if answered:
            notes.append(f"answered by {', '.join(answered)}")
        rows.append(
            {
                **row,
                **prices,
                "context_tokens": bench.meta["endpoint"].get("context"),
                "parameters": ", ".join(honoured),
                "as_of": bench.meta["created"],
                "n": int(table.loc["ttft_s", "n"]),  # pyright: ignore[reportArgumentType]
                "source": f"measured here at {bench.meta['endpoint']['url']}",
                "note": "; ".join(notes),
            }
        )
    return rows


def _charged(requests: pd.DataFrame, price: Sequence[float] | None) -> tuple[dict[str, float], list[str]]:
    """Return the cost per million tokens of successful requests, as billed and at a price, with notes."""
    good = requests[requests["outcome"] == "ok"].dropna(subset=["input_tokens", "output_tokens"])
    billed = good.dropna(subset=["cost_usd"])
    read, written = (good[name].sum() for name in ("input_tokens", "output_tokens"))
    tokens = billed["input_tokens"].sum() + billed["output_tokens"].sum()
    found = {
        "list_usd_per_mtok": np.nan
        if price is None or not read + written
        else (read * price[0] + written * price[1]) / (read + written),
        "charged_usd_per_mtok": 1e6 * billed["cost_usd"].sum() / tokens if tokens else np.nan,
    }
    return found, [f"{len(billed)} of {len(good)} say what they cost"] if 0 < len(billed) < len(good) else []


def _contradictions(frame: pd.DataFrame) -> list[str]:
    found = [""] * len(frame)
    stated = frame[frame["kind"] != "measured"]
    for _, group in stated.groupby(["provider", "model"]):
        told = []
        for name in _STATED:
            values = sorted(group[name].dropna().unique())
            if len(values) > 1:
                told.append(f"{name}: {' or '.join(f'{value:g}' for value in values)}")
        if group["usd_per_call"].notna().any() and group["input_usd_per_mtok"].notna().any():
            told.append(f"priced by token and, at ${group['usd_per_call'].max():g}, by call")
        if any("not supported" in note for note in group["note"]):
            told.append("what it supports: see its note")
        for at in group.index:
            found[int(at)] = "; ".join(told)
    return found
