"""What mixlens bench knows of a model that it loads and measures here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from mixlens.cli.quantization import read_quantization
from mixlens.errors import BadInput

if TYPE_CHECKING:
    from mixlens.bench.bench import Bench
    from mixlens.bench.prompts import Workload

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
_OF_ENDPOINTS = ("model", "protocol", "key_env", "provider", "sweep", "rate", "max_dollars", "price")
_OF_MODELS = ("device_map", "dtype", "quantization", "experts", "static_cache", "compiled", "no_recording")


def add_local_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for a loaded model."""
    group = parser.add_argument_group("for a model that is measured here")
    group.add_argument("--device-map", metavar="PLACE", help="as in mixlens.load, such as auto, cpu or cuda:0")
    group.add_argument(
        "--dtype", metavar="NAME,...", help="float32, bfloat16 or float16, each measured (default: as in mixlens.load)"
    )
    group.add_argument(
        "--quantization",
        metavar="S,S,...",
        help='schemes, each measured: "none,nf4"; with parts, divided by semicolons: "none;attention=nf4,experts=hqq2"',
    )
    group.add_argument("--experts", metavar="NAME,...", help="eager, grouped_mm, batched_mm: each is measured")
    group.add_argument("--static-cache", action="store_true", help="keys and values in memory set aside")
    group.add_argument("--compiled", action="store_true", help="decode through torch.compile, in a static cache")
    group.add_argument("--no-recording", action="store_true", help="leave routing out, and with it the bytes read")


def is_address(target: str) -> bool:
    """Whether `target` names an endpoint, and not a model to load."""
    from mixlens.endpoints.endpoint import PRESETS

    return "://" in target or target in PRESETS


def check_endpoint_arguments(arguments: argparse.Namespace) -> None:
    """Raises BadInput for options of a model that is measured here, beside an address."""
    if given := _given(arguments, _OF_MODELS):
        raise BadInput(
            f"{arguments.url} was to be measured, with {', '.join(given)}. That is for a model that is loaded here; "
            "how a server holds its model is not ours to choose. Leave it out, or give a Hub id or a folder.",
            argument=given[0],
        )


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [
        f"--{name.replace('_', '-')}" for name in names if not any(getattr(arguments, name) is v for v in (None, False))
    ]


def measured_here(arguments: argparse.Namespace, out: str, workload: Workload) -> Bench:
    """The benchmark of the model that the arguments name, in one configuration or in all that they combine.

    Raises BadInput for options of an endpoint and for a device that torch does not know; ModelError as load does.
    """
    if given := _given(arguments, _OF_ENDPOINTS):
        raise BadInput(
            f"{arguments.url} was to be loaded and measured, with {', '.join(given)}. That is for an endpoint, and "
            f"{arguments.url!r} is no address. Leave it out, or give an address that begins with http.",
            argument=given[0],
        )
    import torch

    from mixlens.bench.configurations import benchmark_configurations
    from mixlens.bench.local import LocalSettings, check_calls, loads_of
    from mixlens.bench.run import benchmark
    from mixlens.models.load import load

    place = arguments.device_map
    try:
        torch.device("cpu" if place is None or place in _SPREAD or place.isdigit() else place)
    except RuntimeError as error:
        raise BadInput(
            f"A model was to be measured on {place!r}. torch knows no such device. Give auto, cpu, cuda:0, or another "
            "device of torch.",
            argument="--device",
            value=place,
        ) from error
    settings = LocalSettings(
        warmup=arguments.warmup,
        experts=[name.strip() for name in arguments.experts.split(",")] if arguments.experts else None,
        static_cache=arguments.static_cache,
        compiled=arguments.compiled,
        recording=not arguments.no_recording,
        max_seconds=arguments.max_seconds,
        progress=not arguments.json,
    )
    asked = {"requests": arguments.requests, "out": out, "workload": workload, "settings": settings}
    asked["concurrency"] = numbers_of(arguments.concurrency, int)
    check_calls(arguments.requests, settings)  # before a model is loaded, which may take long
    loads_of(asked["concurrency"], workload, settings)
    combined = _configurations(arguments)
    if len(combined) > 1:
        return benchmark_configurations(arguments.url, combined, **asked)
    return benchmark(load(arguments.url, verbose=not arguments.json, **combined[0]), **asked)


def _configurations(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Arguments of load: every dtype with every quantization."""
    quantizations: list[Any] = [None]
    if arguments.quantization is not None:
        schemes = arguments.quantization
        parted = schemes.split(";") if ";" in schemes or "=" in schemes else schemes.split(",")
        named = [scheme.strip() for scheme in parted if scheme.strip()]
        quantizations = [None if scheme == "none" else read_quantization(scheme) for scheme in named]
    dtypes = arguments.dtype.split(",") if arguments.dtype else [None]
    return [
        {"device_map": arguments.device_map, "dtype": dtype, "quantization": scheme}
        for dtype, scheme in product(dtypes, quantizations)
    ]


def numbers_of(text: str | None, kind: type, what: str = "A load") -> list[Any] | None:
    """A list such as "1,4,16"; None for None. Raises BadInput for what is none, and names it as `what`."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"{what} of {text!r} was asked for. That is no list of numbers. Give it as 1,4,16.",
            argument=what,
            value=text,
        ) from error
