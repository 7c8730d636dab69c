"""The commands mixlens compare, impact and pareto."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixlens.cli.arguments import read, read_documents, reading_arguments
from mixlens.cli.quantization import read_quantization
from mixlens.errors import BadInput


def add_commands(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Declare all three; `add` makes the parser of a command from its name, what runs it, and what it does."""
    compare = add("compare", _compare, "say what differs between two runs of one kind")
    compare.add_argument("a", metavar="RUN", help="run directory")
    compare.add_argument("b", metavar="RUN", help="run directory of the same tokens, samples or load")

    impact = add("impact", _impact, "measure what quantization does to predictions, routing and every expert")
    reading_arguments(impact)
    impact.add_argument("--by", metavar="COLUMN", help="document column, such as domain")
    impact.add_argument(
        "--force-weights", action="store_true", help="under the other's routing also use the other's router weights"
    )

    pareto = add("pareto", _pareto, "measure quality, bytes and speed of a model in several schemes")
    reading_arguments(pareto)
    pareto.add_argument(
        "--schemes",
        required=True,
        metavar="S;S;...",
        help='such as "nf4,hqq3,bfloat16"; with parts, divided by semicolons: "nf4;attention=nf4,experts=hqq2"',
    )
    pareto.add_argument("--calls", type=int, default=8, help="timed calls a scheme, 0 for none (default: %(default)s)")
    pareto.add_argument(
        "--scores", action="append", default=[], metavar="SCHEME=RUN", help="evaluation of a scheme; can be repeated"
    )


def _compare(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.comparison import Comparison, compare

    found = compare(arguments.a, arguments.b)
    if not arguments.json:
        print(repr(found))
        return None
    if isinstance(found, Comparison):
        return {"runs": list(found.names), "rows": _rows(found.overview()), "missing": found.missing()}
    return {"runs": [arguments.a, arguments.b], "rows": json.loads(found.table.to_json(orient="records"))}


def _impact(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.experiments.impact import SETTINGS, quantization_impact
    from mixlens.models.load import load
    from mixlens.plot.tables import tidy

    if arguments.quantization is None:
        raise BadInput(
            "The impact of quantization was asked for. No scheme was given. Give one, such as --quantization nf4.",
            argument="--quantization",
        )
    placed = {name: getattr(arguments, name) for name in ("device_map", "dtype", "revision", "quantization")}
    changed = load(arguments.model, **placed)
    arguments.quantization = None
    documents, model, settings = read(arguments, SETTINGS)
    found = quantization_impact(
        model, changed, documents, out=arguments.out, force_weights=arguments.force_weights, settings=settings
    )
    parts = None if arguments.by is None else tidy(found.split(by=arguments.by))
    if arguments.json:
        extra = {} if parts is None else {"split": json.loads(parts.to_json(orient="records"))}
        return {"run": arguments.out, "rows": _rows(found.overview()), **extra}
    print(repr(found))
    if parts is not None:
        print(f"\nThe change divided, by {arguments.by}:\n{parts.round(4).to_string(index=False)}")
    return None


def _pareto(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from dataclasses import replace

    from mixlens.experiments.pareto import SETTINGS, Speed, pareto
    from mixlens.registry import open as open_any

    if arguments.quantization is not None:
        raise BadInput(
            f"Schemes were to be laid side by side under --quantization {arguments.quantization}. The original is "
            "loaded without one. Give it among --schemes.",
            argument="--quantization",
            value=arguments.quantization,
        )
    documents = [d for path in arguments.documents for d in read_documents(Path(path), arguments.limit)]
    names = ("text", "max_length", "overlong", "batch_tokens")
    found = pareto(
        arguments.model,
        documents,
        schemes=_schemes(arguments.schemes),
        out=arguments.out,
        loading={name: getattr(arguments, name) for name in ("device_map", "dtype", "revision")},
        speed=Speed(calls=arguments.calls),
        settings=replace(SETTINGS, **{name: getattr(arguments, name) for name in names}),
    )
    if arguments.scores:
        found = found.with_scores({scheme: open_any(run) for scheme, run in map(_score, arguments.scores)})
    if arguments.json:
        return {"run": arguments.out, "front": found.front(), "rows": json.loads(found.table.to_json(orient="records"))}
    print(f"{found!r}\n\ntable and figure: {arguments.out}")
    return None


def _schemes(text: str) -> list[Any]:
    """Schemes between semicolons; where no parts are named commas divide too."""
    divided = text.split(";") if ";" in text or "=" in text else text.split(",")
    return [read_quantization(one.strip()) for one in divided if one.strip()]


def _score(text: str) -> tuple[str, str]:
    scheme, _, run = text.rpartition("=")
    if not scheme:
        raise BadInput(
            f"Scores {text!r} were to be added. They name no scheme. Give them as nf4=runs/eval-nf4.",
            argument="--scores",
            value=text,
        )
    return scheme, run


def _rows(overview: Any) -> list[dict[str, Any]]:
    return json.loads(overview.rename_axis("what").reset_index().to_json(orient="records"))
