"""Cost per million tokens of a benchmark's workload, from a provider's list price or the hourly price of a machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from numbers import Real
from urllib.parse import urlsplit

from mixlens.bench.bench import Bench
from mixlens.endpoints.endpoint import canonical
from mixlens.endpoints.prices import cost, prices, provider_at
from mixlens.errors import BadInput


@dataclass(frozen=True)
class Price:
    """Dollars per million input and output tokens of a workload.

    n       number of price statements, or of timed requests
    source  origin of the price
    """

    workload: str
    usd: float
    low: float
    high: float
    n: int
    source: str


def listed(bench: Bench) -> Price | None:
    """Return the price of the workload in the snapshot. The interval runs from the lowest price to the highest.

    The estimate is the highest price. None for a model on this machine, a prompt of unknown length, or a provider that
    is missing in the snapshot.
    """
    workload = bench.meta.get("workload") or {}
    read, written = workload.get("prompt_tokens"), workload.get("output_tokens")
    if "endpoint" not in bench.meta or read is None or written is None:
        return None
    table = prices()
    date, name = table.attrs["date"], canonical(bench.meta["endpoint"]["model"])
    table = table[(table["provider"] == provider_at(bench.meta["endpoint"]["url"])) & (table["model"] == name)]
    if table.empty:
        return None
    usd = cost(read, written, table=table)["usd_per_request"].dropna() * 1e6 / (read + written)
    if usd.empty:
        return None
    dearest = float(usd.max())
    return Price(_workload(read, written), dearest, float(usd.min()), dearest, len(usd), f"price of {date}")


def rented(bench: Bench, usd_per_hour: float) -> Price | None:
    """Return the price of the workload on a machine billed by the hour and never idle, at its cheapest load.

    usd = (dollars per hour / 3600) / (requests per second * input and output tokens per request) * 1e6

    The bounds follow from those of the requests per second, and are infinite if those are unknown. None if no request
    succeeded or tokens were not counted.
    """
    rates = bench.throughput().query("metric == 'requests_per_s'")
    requests = bench.requests().query("phase == 'measured' and outcome == 'ok'")
    asked = bench.meta.get("workload") or {}
    found = []
    for rate in rates.to_dict("records"):
        tokens = requests.loc[requests["level"] == rate["level"], ["input_tokens", "output_tokens"]].mean()
        each = usd_per_hour / 3600 * 1e6 / tokens.sum(skipna=False)
        if not each / rate["estimate"] > 0:  # NaN if tokens are unknown or no request succeeded
            continue
        low = each / rate["ci_high"] if rate["ci_high"] > 0 else -math.inf
        high = each / rate["ci_low"] if rate["ci_low"] > 0 else math.inf
        read, written = (
            asked.get(name) or round(tokens[counted])
            for name, counted in (("prompt_tokens", "input_tokens"), ("output_tokens", "output_tokens"))
        )
        source = f"${usd_per_hour:g} an hour at {rate['level']}"
        found.append(Price(_workload(read, written), each / rate["estimate"], low, high, int(rate["n"]), source))
    return min(found, key=lambda price: price.usd, default=None)


def hourly_of(benches: Iterable[Bench], usd_per_hour: float | Mapping[str, float] | None) -> dict[str, float]:
    """Return dollars per hour by machine name or server address.

    A single number applies to the one machine on which models were loaded, or to the server on this machine. Raises
    BadInput if several or no machines fit, for names that no benchmark has, and for invalid prices.
    """
    if usd_per_hour is None:
        return {}
    known = {place(bench): _here(bench) for bench in benches}
    if not isinstance(usd_per_hour, Mapping):
        here = [name for name, own in known.items() if own]
        if len(here) != 1:
            where = f"on {' and '.join(here)}" if here else "on no machine of your own"
            raise BadInput(
                f"Cannot apply one price by the hour: the runs hold benchmarks {where}. Pass a mapping from the name "
                "of each machine, or the address of each server, to its price, or add a benchmark.",
                argument="usd_per_hour",
                value=usd_per_hour,
            )
        usd_per_hour = {here[0]: usd_per_hour}
    for name, usd in usd_per_hour.items():
        if name not in known:
            raise BadInput(
                f"Cannot apply a price by the hour to {name!r}: the benchmarks are of {', '.join(known) or 'none'}. "
                "Pass one of these, or add its benchmark.",
                argument="usd_per_hour",
                value=name,
            )
        if isinstance(usd, bool) or not isinstance(usd, Real) or not 0 < float(usd) < math.inf:
            raise BadInput(
                f"Cannot use {usd!r} as a price by the hour: it is not a positive number. Pass dollars above 0.",
                argument="usd_per_hour",
                value=usd,
            )
    return {name: float(usd) for name, usd in usd_per_hour.items()}


def place(bench: Bench) -> str:
    """Return the name of the machine or the address of the server on which a benchmark was measured."""
    server, machine = bench.meta.get("endpoint", {}), bench.meta.get("machine", {})
    return str(server.get("url") or machine.get("name") or "")


def _here(bench: Bench) -> bool:
    if "endpoint" not in bench.meta:
        return True
    host = urlsplit(bench.meta["endpoint"]["url"]).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _workload(read: int, written: int) -> str:
    return f"{read:,} in, {written:,} out"
