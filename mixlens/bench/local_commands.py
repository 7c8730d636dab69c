"""What mixlens bench knows of a model that it loads and measures here."""

from __future__ import annotations

import argparse
from typing import Any

from mixlens.errors import BadInput

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
_OF_ENDPOINTS = ("model", "protocol", "key_env", "provider", "sweep", "rate", "max_dollars")


def add_local_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for a loaded model."""
    group = parser.add_argument_group("for a model that is measured here")
    group.add_argument("--device-map", metavar="PLACE", help="as in mixlens.load, such as auto, cpu or cuda:0")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as in mixlens.load)")
    group.add_argument("--quantization", metavar="SCHEME", help="as in mixlens.load, such as nf4")
    group.add_argument("--experts", metavar="NAME,...", help="eager, grouped_mm, batched_mm: each is measured")
    group.add_argument("--static-cache", action="store_true", help="keys and values in memory set aside")
    group.add_argument("--compiled", action="store_true", help="decode through torch.compile, in a static cache")
    group.add_argument("--no-recording", action="store_true", help="leave routing out, and with it the bytes read")


def is_address(target: str) -> bool:
    """Whether `target` names an endpoint, and not a model to load."""
    from mixlens.models.endpoint import PRESETS

    return "://" in target or target in PRESETS


def loaded(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model that the arguments name, and its LocalSettings.

    Raises BadInput for options of an endpoint and for a device that torch does not know; ModelError as load does.
    """
    given = [f"--{name.replace('_', '-')}" for name in _OF_ENDPOINTS if getattr(arguments, name, None) is not None]
    if given:
        raise BadInput(
            f"{arguments.url} was to be loaded and measured, with {', '.join(given)}. That is for an endpoint, and "
            f"{arguments.url!r} is no address. Leave it out, or give an address that begins with http."
        )
    import torch

    from mixlens.bench.local import LocalSettings
    from mixlens.models.load import load

    place = arguments.device_map
    try:
        torch.device("cpu" if place is None or place in _SPREAD or place.isdigit() else place)
    except RuntimeError as error:
        raise BadInput(
            f"A model was to be measured on {place!r}. torch knows no such device. Give auto, cpu, cuda:0, or another "
            "device of torch."
        ) from error
    settings = LocalSettings(
        warmup=arguments.warmup,
        experts=arguments.experts.split(",") if arguments.experts else None,
        static_cache=arguments.static_cache,
        compiled=arguments.compiled,
        recording=not arguments.no_recording,
        max_seconds=arguments.max_seconds,
        progress=not arguments.json,
    )
    options = {"dtype": arguments.dtype, "quantization": arguments.quantization, "verbose": not arguments.json}
    return load(arguments.url, device_map=place, **options), settings
