"""The commands mixlens importance, contributions and topk."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mixlens.cli.arguments import numbers, read, reading_arguments, table


def add_commands(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Declare all three; `add` makes the parser of a command from its name, what runs it, and what it does."""
    importance = add("importance", _importance, "measure the loss without each expert of each layer")
    importance.add_argument(
        "--how",
        choices=("reroute", "zero", "mean"),
        default="reroute",
        help="never chosen, output zero, or output its mean over the same documents (default: %(default)s)",
    )
    importance.add_argument("--layers", metavar="L,L,...", help="only these layers")

    contributions = add(
        "contributions", _contributions, "measure what each chosen expert adds to the logit of the next token"
    )
    contributions.add_argument(
        "--measure",
        choices=("logit", "norm"),
        default="logit",
        help="what the table has; the run has both (default: %(default)s)",
    )

    topk = add("topk", _topk, "measure the loss when every token chooses k experts, for each k")
    topk.add_argument("--ks", metavar="K,K,...", help="only these (default: 1 to all)")

    for parser in (importance, contributions, topk):
        reading_arguments(parser)
        parser.add_argument("--by", metavar="COLUMN", help="document column, such as domain")
        parser.add_argument("--csv", metavar="FILE", help="write the table there instead")


def _importance(arguments: argparse.Namespace) -> Any:
    from mixlens.experiments.contributions import expert_outputs
    from mixlens.experiments.importance import SETTINGS, Ablation, measure_importance
    from mixlens.stats import expert_importance

    documents, model, settings = read(arguments, SETTINGS)
    means = expert_outputs(model, documents, settings=settings)["mean"] if arguments.how == "mean" else None
    layers = numbers(arguments.layers, "Layers") if arguments.layers else None
    ablation = Ablation(how=arguments.how, means=means, layers=layers)
    measured = measure_importance(model, documents, out=arguments.out, ablation=ablation, settings=settings)
    return table(expert_importance(measured, by=arguments.by), arguments, also=["share"])


def _contributions(arguments: argparse.Namespace) -> Any:
    from mixlens.experiments.contributions import SETTINGS, expert_contributions
    from mixlens.stats import expert_contribution

    documents, model, settings = read(arguments, SETTINGS)
    found = expert_contributions(model, documents, out=arguments.out, settings=settings)
    return table(expert_contribution(found, measure=arguments.measure, by=arguments.by), arguments, also=["max_abs"])


def _topk(arguments: argparse.Namespace) -> Any:
    from mixlens.experiments.topk import SETTINGS, measure_topk
    from mixlens.stats import topk_sweep

    documents, model, settings = read(arguments, SETTINGS)
    ks = numbers(arguments.ks, "Values of k") if arguments.ks else None
    measured = measure_topk(model, documents, ks=ks, out=arguments.out, settings=settings)
    return table(topk_sweep(measured, by=arguments.by), arguments, also=["change", "change_low", "change_high"])
