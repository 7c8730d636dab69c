"""The commands `importance`, `contributions`, `topk`, `impact`, `pareto` and `audit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from cyclopts import Parameter

from mixlens.cli.app import Result, app
from mixlens.cli.options import Dtype, Integers, Loading, NotNegative, Output, Reading, Schemes
from mixlens.cli.tables import check_csv, rows_of, statistic, written
from mixlens.core.run_dir import check_out
from mixlens.errors import BadInput

if TYPE_CHECKING:
    from mixlens.evals.log import Log


@app.command
def importance(
    model: str,
    documents: list[str],
    /,
    *,
    out: str,
    how: Literal["reroute", "zero", "mean"] = "reroute",
    layers: Integers | None = None,
    by: str | None = None,
    csv: str | None = None,
    reading: Reading = Reading(),
    loading: Loading = Loading(),
    output: Output = Output(),
) -> Result:
    """Measure the loss with each expert of each layer ablated.

    Parameters
    ----------
    model
        Hub id, folder, or "demo".
    documents
        Files of JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, folders, - for standard input, or owner/name on the
        Hub.
    out
        Run directory. An interrupted run there is resumed.
    how
        Reroute tokens to other experts, set the output of the expert to zero, or to its mean over the same documents.
    layers
        Only these layers.
    by
        Column of the documents to group by, such as domain.
    csv
        Write the table to this file instead of printing it.
    """
    from mixlens.experiments.contributions import expert_outputs
    from mixlens.experiments.importance import SETTINGS, Ablation, measure_importance
    from mixlens.models.layout import numbered_layers
    from mixlens.stats import expert_importance

    check_out(out, "importance")
    check_csv(csv)
    texts, settings = reading.documents(documents, by=by), reading.settings(SETTINGS, output)
    if layers is not None:
        numbered_layers(loading.skeleton(model), list(layers), "ablate experts")  # loading may take long
    loaded = loading.load(model, output)
    means = expert_outputs(loaded, texts, settings=settings)["mean"] if how == "mean" else None
    ablation = Ablation(how=how, means=means, layers=None if layers is None else list(layers))
    measured = measure_importance(loaded, texts, out=out, ablation=ablation, settings=settings)
    return statistic(expert_importance(measured, by=by), csv=csv, also=["share"])


@app.command
def contributions(
    model: str,
    documents: list[str],
    /,
    *,
    out: str,
    measure: Literal["logit", "norm"] = "logit",
    by: str | None = None,
    csv: str | None = None,
    reading: Reading = Reading(),
    loading: Loading = Loading(),
    output: Output = Output(),
) -> Result:
    """Measure what each chosen expert adds to the logit of the next token.

    Parameters
    ----------
    model
        Hub id, folder, or "demo".
    documents
        Files of JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, folders, - for standard input, or owner/name on the
        Hub.
    out
        Run directory. An interrupted run there is resumed.
    measure
        Measure shown in the table; the run contains both.
    by
        Column of the documents to group by, such as domain.
    csv
        Write the table to this file instead of printing it.
    """
    from mixlens.experiments.contributions import SETTINGS, measure_contributions
    from mixlens.stats import expert_contribution

    check_out(out, "contributions")
    check_csv(csv)
    texts, settings = reading.documents(documents, by=by), reading.settings(SETTINGS, output)
    found = measure_contributions(loading.load(model, output), texts, out=out, settings=settings)
    return statistic(expert_contribution(found, measure=measure, by=by), csv=csv, also=["max_abs"])


@app.command
def topk(
    model: str,
    documents: list[str],
    /,
    *,
    out: str,
    ks: Integers | None = None,
    by: str | None = None,
    csv: str | None = None,
    reading: Reading = Reading(),
    loading: Loading = Loading(),
    output: Output = Output(),
) -> Result:
    """Measure the loss as a function of the number k of experts per token.

    Parameters
    ----------
    model
        Hub id, folder, or "demo".
    documents
        Files of JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, folders, - for standard input, or owner/name on the
        Hub.
    out
        Run directory. An interrupted run there is resumed.
    ks
        Values of k. By default 1 to the number of experts.
    by
        Column of the documents to group by, such as domain.
    csv
        Write the table to this file instead of printing it.
    """
    from mixlens.experiments.topk import SETTINGS, checked_ks, measure_topk
    from mixlens.stats import topk_sweep

    check_out(out, "topk")
    check_csv(csv)
    texts, settings = reading.documents(documents, by=by), reading.settings(SETTINGS, output)
    if ks is not None:
        checked_ks(loading.skeleton(model), list(ks))  # loading may take long
    measured = measure_topk(
        loading.load(model, output), texts, ks=None if ks is None else list(ks), out=out, settings=settings
    )
    return statistic(topk_sweep(measured, by=by), csv=csv, also=["change", "change_low", "change_high"])


@app.command
def impact(
    model: str,
    documents: list[str],
    /,
    *,
    out: str,
    by: str | None = None,
    force_weights: bool = False,
    reading: Reading = Reading(),
    loading: Loading = Loading(),
    output: Output = Output(),
) -> Result:
    """Measure the effect of quantization on predictions, routing and every expert.

    Parameters
    ----------
    model
        Hub id, folder, or "demo".
    documents
        Files of JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, folders, - for standard input, or owner/name on the
        Hub.
    out
        Run directory. An interrupted run there is resumed.
    by
        Column of the documents to group by, such as domain.
    force_weights
        When the routing of the other model is forced, also force its router weights.
    """
    from mixlens.experiments.impact import SETTINGS, measure_impact
    from mixlens.plot.tables import tidy

    if loading.quantization is None:
        raise BadInput(
            "Cannot measure the impact of quantization: no scheme is given. Pass one, such as --quantization nf4.",
            argument="--quantization",
        )
    check_out(out, "impact")
    texts, settings = reading.documents(documents, by=by), reading.settings(SETTINGS, output)
    changed = loading.load(model, output)
    original = replace(loading, quantization=None).load(model, output)
    found = measure_impact(original, changed, texts, out=out, force_weights=force_weights, settings=settings)
    data, text = {"run": out, "rows": rows_of(found.overview().rename_axis("what").reset_index())}, repr(found)
    if by is not None:
        parts = tidy(found.split(by=by))
        data["split"] = rows_of(parts)
        text += f"\n\nThe change by part, by {by}:\n{parts.round(4).to_string(index=False)}"
    return Result(data, text)


@app.command
def pareto(
    model: str,
    documents: list[str],
    /,
    *,
    out: str,
    schemes: Schemes,
    calls: NotNegative = 8,
    scores: Annotated[list[str] | None, Parameter(metavar="SCHEME=RUN")] = None,
    csv: str | None = None,
    reading: Reading = Reading(),
    loading: Loading = Loading(),
    output: Output = Output(),
) -> Result:
    """Measure quality, size and speed of a model in several quantization schemes.

    Parameters
    ----------
    model
        Hub id, folder, or "demo".
    documents
        Files of JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, folders, - for standard input, or owner/name on the
        Hub.
    out
        Run directory.
    schemes
        Schemes such as "nf4,hqq3,bfloat16". Separate schemes for parts of the model by semicolons:
        "nf4;attention=nf4,experts=hqq2".
    calls
        Timed calls per scheme; 0 for none.
    scores
        Evaluation run of a scheme. Repeatable.
    csv
        Also write the table to this file.
    """
    from mixlens.evals.log import Log
    from mixlens.experiments.pareto import SETTINGS, Speed, measure_pareto

    if loading.quantization is not None:
        raise BadInput(
            "Cannot combine --quantization with --schemes: the original is loaded without quantization. Add the scheme "
            "to --schemes.",
            argument="--quantization",
            value=loading.quantization,
        )
    check_out(out, "pareto")
    check_csv(csv)
    evaluations = {scheme: Log.open(run) for scheme, run in map(_score, scores or [])}
    _check_scores(evaluations)
    found = measure_pareto(
        model,
        reading.documents(documents),
        schemes=schemes,
        out=out,
        loading={"device_map": loading.device_map, "dtype": loading.dtype, "revision": loading.revision},
        speed=Speed(calls=calls),
        settings=reading.settings(SETTINGS, output),
    )
    if evaluations:
        found = found.with_scores(evaluations)
    if csv is not None:
        written(found.table, csv)
    data = {"run": out, "front": found.front(), "rows": rows_of(found.table)}
    return Result(data, f"{found!r}\n\ntable and figure: {out}")


@app.command
def audit(model: str, /, *, loading: Loading = Loading(), output: Output = Output()) -> Result:
    """Report the bytes of each kind of weight.

    Parameters
    ----------
    model
        Hub id, folder, or "demo".
    """
    from mixlens.models.provenance import audit

    found = audit(loading.load(model, output))
    return Result(found.summary(), str(found))


def _check_scores(evaluations: Mapping[str, Log]) -> None:
    """Raise BadInput for an evaluation of unquantized weights under the name of another scheme."""
    from mixlens.stats.pareto import WEIGHTS

    for scheme, log in evaluations.items():
        label = WEIGHTS["quantization"](log.meta["model"])
        if label in get_args(Dtype) and label != scheme:
            raise BadInput(
                f"Cannot use --scores {scheme}={log.path}: this run evaluated weights in {label}. Pass the evaluation "
                f"of the model in {scheme}.",
                argument="--scores",
                value=scheme,
            )


def _score(text: str) -> tuple[str, str]:
    scheme, _, run = text.rpartition("=")
    if not scheme:
        raise BadInput(
            f"Cannot use --scores {text}: the scheme is missing. Write it as in nf4=runs/eval-nf4.",
            argument="--scores",
            value=text,
        )
    return scheme, run
