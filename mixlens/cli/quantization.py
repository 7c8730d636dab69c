"""The command mixlens audit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_commands(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Declare it; `add` makes the parser of a command from its name, what runs it, and what it does."""
    audit = add("audit", _audit, "count the bytes that each kind of weight really takes")
    audit.add_argument("model", help='Hub id, folder, or "demo"')
    add_quantization(audit)
    audit.add_argument("--device-map", help='as in accelerate, such as "auto" or "cpu"')
    audit.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    audit.add_argument("--revision", help="branch, tag or commit on the Hub")


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """The option --quantization, of every command that loads a model."""
    parser.add_argument(
        "--quantization",
        type=read_quantization,
        metavar="SCHEME",
        help='such as nf4, int8, hqq2-g16; or by part: "attention=nf4,experts=hqq2,*.layers.0.*=none"',
    )


def read_quantization(text: str) -> str | dict[str, str]:
    """What `load` takes, from "nf4" or "attention=nf4,experts=hqq2"."""
    if "=" not in text:
        return text
    return {part: scheme for part, _, scheme in (entry.partition("=") for entry in text.split(","))}


def _audit(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.models.load import load
    from mixlens.models.provenance import audit

    names = ("device_map", "dtype", "revision", "quantization")
    model = load(arguments.model, verbose=not arguments.json, **{name: getattr(arguments, name) for name in names})
    found = audit(model)
    if arguments.json:
        return found.summary()
    print(found)
    return None
