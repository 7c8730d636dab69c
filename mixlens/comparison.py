"""Compare two runs of one kind."""

from __future__ import annotations

import html
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import xarray as xr

from mixlens.bench.bench import Bench
from mixlens.bench.comparison import BenchComparison, compare_benches
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.text import row, shown
from mixlens.engines.check import explained
from mixlens.errors import BadInput, MissingSignal, visible
from mixlens.evals.log import Log
from mixlens.evals.paired import LogComparison, compare_logs
from mixlens.registry import open as open_any
from mixlens.stats.agreement import agreement, same_shape
from mixlens.stats.clusters import By
from mixlens.stats.flips import flips, flips_by_margin, routers_changed
from mixlens.stats.inputs import require
from mixlens.stats.likelihoods import likelihood_gap, routing_split
from mixlens.stats.next_tokens import next_tokens
from mixlens.stats.published import two_engines
from mixlens.trace.trace import Trace
from mixlens.trace.vocabulary import same_tokenizer

if TYPE_CHECKING:
    from torch import nn

    from mixlens.experiments.rerun import Rerun


def compare(
    run_a: Trace | Log | Bench | str | os.PathLike[str],
    run_b: Trace | Log | Bench | str | os.PathLike[str] | nn.Module,
    *,
    sample: int | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> Comparison | LogComparison | BenchComparison:
    """Compare two runs of one kind with paired intervals, or a trace with a model that rereads its tokens.

    Two traces of the same tokens give a Comparison of routing and predictions, two evaluations of the same samples the
    result of mixlens.evals.paired.compare_logs, and two benchmarks that of mixlens.bench.comparison.compare_benches. A
    trace and a loaded model give an EngineComparison, which also splits the gap between them into routing and the rest.

    Parameters
    ----------
    run_a : Trace or Log or Bench or str or os.PathLike
        Object or path of a run directory.
    run_b : Trace or Log or Bench or str or os.PathLike or torch.nn.Module
        The same; with a trace, also a model that rereads its tokens.
    sample : int, optional
        Most documents that the model rereads; None for 64.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    Comparison or LogComparison or BenchComparison

    Raises
    ------
    BadInput
        If the runs are of different kinds, or the tokens, tokenizers or layers of the traces differ; the message names
        the first difference.
    RunError
        If a run cannot be opened.

    Examples
    --------
    >>> type(ml.compare(trace, trace)).__name__
    'Comparison'
    """
    a, b = (open_any(run) if isinstance(run, str | os.PathLike) else run for run in (run_a, run_b))
    if isinstance(a, Trace) and hasattr(b, "named_modules"):
        from mixlens.experiments.rerun import rerun  # torch takes seconds to import

        return EngineComparison(
            rerun(a, cast("nn.Module", b), sample=64 if sample is None else sample), bootstrap=bootstrap
        )
    if sample is not None:
        raise BadInput(
            f"Cannot compare a sample of {_kind(a)} with {_kind(b)}: only a model reads a sample again. Leave sample= "
            "out, or pass a trace and a loaded model.",
            argument="sample",
            value=sample,
        )
    if isinstance(a, Trace) and isinstance(b, Trace):
        return Comparison(a, b, bootstrap=bootstrap)
    if isinstance(a, Log) and isinstance(b, Log):
        return compare_logs(a, b, bootstrap=bootstrap)
    if isinstance(a, Bench) and isinstance(b, Bench):
        return compare_benches(a, b, bootstrap=bootstrap)
    raise BadInput(
        f"Cannot compare {_kind(a)} with {_kind(b)}. Pass two traces, two evaluations or two benchmarks.",
        argument="kind",
        value=(_kind(a), _kind(b)),
    )


class Comparison:
    """Compare two traces of the same tokens: routing, where it diverges, and predictions.

    Each statistic is computed on first use and cached.

    Parameters
    ----------
    a, b : Trace
        The traces.
    names : tuple[str, str], optional
        Names of the traces in tables.
    bootstrap : Bootstrap, optional
        How intervals over documents are computed.

    Raises
    ------
    BadInput
        If layers, experts, tokenizers or tokens differ; the message names the first difference.

    Examples
    --------
    >>> ml.compare(trace, trace).flips()["estimate"].dims
    ('layer', 'measure')
    """

    kind = "comparison"

    def __init__(
        self, a: Trace, b: Trace, *, names: tuple[str, str] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> None:
        require(a, "compare", "expert_id", bootstrap=bootstrap)
        require(b, "compare", "expert_id")
        same_shape(a, b)
        same_tokenizer(a.vocabulary, b.vocabulary)
        self.a, self.b, self.bootstrap = a, b, bootstrap
        self.names = _names(a, b) if names is None else names
        self._kept: dict[Any, xr.Dataset] = {}
        self.flips()  # reads both traces, and so detects different tokens

    @property
    def meta(self) -> dict[str, Any]:
        """Return the metadata of both traces."""
        return {"model": {"name": " and ".join(self.names)}, "a": self.a.meta, "b": self.b.meta}

    def agreement(self, *, by: By = None) -> xr.Dataset:
        """Compute :func:`mixlens.stats.agreement` of both traces, ``[*by, layer, measure]``.

        Parameters
        ----------
        by : By, optional
            Column or columns of the sequences to group by.
        """
        return self._keep(agreement, by)

    def flips(self, *, by: By = None) -> xr.Dataset:
        """Compute :func:`mixlens.stats.flips` of both traces, ``[*by, layer, measure]``.

        Parameters
        ----------
        by : By, optional
            Column or columns of the sequences to group by.
        """
        return self._keep(flips, by)

    def flips_by_margin(self, *, by: By = None) -> xr.Dataset:
        """Compute :func:`mixlens.stats.flips_by_margin` over all layers together, ``[*by, margin]``.

        Parameters
        ----------
        by : By, optional
            Column or columns of the sequences to group by.
        """
        return self._keep(flips_by_margin, by)

    def next_tokens(self, *, by: By = None) -> xr.Dataset:
        """Compute :func:`mixlens.stats.next_tokens` of both traces, ``[*by, measure]``.

        Parameters
        ----------
        by : By, optional
            Column or columns of the sequences to group by.
        """
        return self._keep(next_tokens, by)

    def _keep(self, statistic: Any, by: By) -> xr.Dataset:
        key = statistic.__name__, by if by is None or isinstance(by, str) else tuple(by)
        if key not in self._kept:
            self._kept[key] = statistic(self.a, self.b, by=by, bootstrap=self.bootstrap)
        return self._kept[key]

    def missing(self) -> dict[str, str]:
        """Return the statistics that cannot be computed for lack of signals, with the reason."""
        found = {}
        for name in ("agreement", "flips_by_margin", "next_tokens"):
            try:
                lacking = getattr(self, name)().attrs.get("missing")
            except (MissingSignal, BadInput) as error:
                found[name] = str(error)
            else:
                if lacking:
                    found[f"part of {name}"] = f"{lacking}."
        return found

    def overview(self) -> pd.DataFrame:
        """Return the main numbers, one per row.

        Returns
        -------
        DataFrame
            Estimate, ci_low, ci_high, unit, n (tokens); NaN where the traces lack signals.
        """
        changed = self.flips().estimate.sel(measure="changed")
        worst = changed.layer.values[int(changed.argmax("layer"))]
        every = self.flips()
        rows = {
            "other experts in the first layer": row(every.isel(layer=0).sel(measure="changed"), "fraction"),
            f"other experts in layer {worst}, the most of any": row(
                every.sel(layer=worst, measure="changed"), "fraction"
            ),
            "other experts in some layer": row(every.isel(layer=-1).sel(measure="so_far"), "fraction"),
        }
        if "logprob" in self.a.signals and "logprob" in self.b.signals:
            data = self.next_tokens()
            asked = {
                f"perplexity of {self.names[0]}": ("perplexity_a", ""),
                f"perplexity of {self.names[1]}": ("perplexity_b", ""),
                "loss, second less first": ("loss_difference", "nats per token"),
                "same most probable next token": ("same_top", "fraction"),
                "KL(first || second), at least": ("kl_at_least", "nats per token"),
            }
            rows |= {name: row(data.sel(measure=measure), unit) for name, (measure, unit) in asked.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def title(self) -> str:
        """Return a title with both names and the numbers of tokens and documents."""
        n = self.flips()
        return (
            f"{self.names[0]} and {self.names[1]}: {int(n.n):,} tokens of {int(n.n_documents):,} documents; "
            f"{self.bootstrap.level:.0%} intervals of paired differences, over documents"
        )

    def __repr__(self) -> str:
        return visible(f"{self.title()}\n{shown(self.overview()).to_string()}")

    def _repr_html_(self) -> str:
        lacking = "".join(f"<div>{html.escape(text)}</div>" for text in self.missing().values())
        return f"<div><p>{html.escape(self.title())}</p>{shown(self.overview()).to_html(escape=True)}{lacking}</div>"


class EngineComparison(Comparison):
    """Compare a trace with a model that rereads its tokens; `a` is the trace, `b` the model.

    Parameters
    ----------
    found : Rerun
        Sample of the trace, and the model's reading of it.
    bootstrap : Bootstrap, optional
        How intervals over documents are computed.

    Examples
    --------
    >>> split = ml.compare(trace, model, sample=2).split()["estimate"].sel(quantity="k3")
    >>> float(split.sel(part=["ids", "weights", "rest"]).sum() - split.sel(part="total"))
    0.0
    """

    def __init__(self, found: Rerun, *, bootstrap: Bootstrap = DEFAULT) -> None:
        source = str(found.theirs.meta.get("source", "trace"))
        names = ["transformers" if source in ("record", "rerun") else source, "transformers here"]
        dtypes = [trace.meta.get("model", {}).get("dtype") for trace in (found.theirs, found.here)]
        names = [f"{name} in {dtype}" if dtype else name for name, dtype in zip(names, dtypes, strict=True)]
        super().__init__(found.theirs, found.here, names=(names[0], names[1]), bootstrap=bootstrap)
        self.found = found

    @cached_property
    def fault(self) -> tuple[str, str] | None:
        """Return the name and description of a known fault that explains the difference; None if none does."""
        a, b = self.a, self.b
        return explained(a.read("expert_id"), b.read("expert_id"), a.read("position"))

    def likelihoods(self, *, by: By = None) -> xr.Dataset:
        """Compute :func:`mixlens.stats.likelihood_gap` of the trace and the model, ``[*by, measure]``.

        Parameters
        ----------
        by : By, optional
            Column or columns of the sequences to group by.
        """
        return self._keep(likelihood_gap, by)

    def split(self, *, by: By = None) -> xr.Dataset:
        """Compute :func:`mixlens.stats.routing_split`, the share of the gap due to routing, ``[*by, quantity, part]``.

        Parameters
        ----------
        by : By, optional
            Column or columns of the sequences to group by.

        Raises
        ------
        MissingSignal
            If the trace has no log-probabilities or no weights.
        """
        for name in ("logprob", "weight"):
            self.a._require_signals("routing_split", name)
        runs = (self.b, self.found.with_ids, self.found.with_weights)
        return routing_split(self.a, *runs, by=by, bootstrap=self.bootstrap)  # type: ignore[arg-type]

    def overview(self) -> pd.DataFrame:
        """Return the main numbers, one per row.

        Returns
        -------
        DataFrame
            Estimate, ci_low, ci_high, unit, n (tokens).
        """
        some_layer = self.flips().isel(layer=-1).sel(measure="so_far")
        rows = {
            "routers that choose other experts": row(self._keep(routers_changed, None), "fraction"),
            "tokens with other experts in some layer": row(some_layer, "fraction"),
        }
        if {"logprob", "weight"} <= set(self.a.signals):
            gap, split = self.likelihoods(), self.split().sel(quantity="k3")
            rows |= {
                "tokens with twice or half the probability": row(gap.sel(measure="extreme"), "fraction"),
                "divergence (K3)": row(split.sel(part="total"), "nats per token"),
                "of it from other experts": row(split.sel(part="ids"), "nats per token"),
                "of it from their weights": row(split.sel(part="weights"), "nats per token"),
                "of it from the rest": row(split.sel(part="rest"), "nats per token"),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def title(self) -> str:
        """Return a title with names, counts, the known fault if any, and published figures for scale."""
        fault = "" if self.fault is None else f" The routing of {self.names[0]} is off: {self.fault[1]}."
        published = two_engines()
        routers, tokens = (f"{float(published.estimate.sel(measure=name)):.0%}" for name in ("routers", "tokens"))
        return (
            f"{super().title()}.{fault} Of two other engines, about {routers} of routers and {tokens} of tokens in "
            f"some layer ({published.attrs['source']})"
        )


def _kind(run: Any) -> str:
    if isinstance(run, xr.Dataset):
        return f"a run of {run.attrs.get('kind', 'another kind')}"
    return {"Trace": "a trace", "Log": "an evaluation", "Bench": "a benchmark"}.get(
        type(run).__name__, f"of {type(run).__name__}"
    )


def _names(a: Trace, b: Trace) -> tuple[str, str]:
    """Return the folder names of the runs, or else the model names; equal names are numbered."""
    models = [trace.meta.get("model", {}) for trace in (a, b)]
    named = [str(model.get("name", "") if isinstance(model, dict) else model).rsplit("/", 1)[-1] for model in models]
    found = [trace.path.name if trace.path is not None else name for trace, name in zip((a, b), named, strict=True)]
    if found[0] == found[1]:
        return f"{found[0] or 'run'} (first)", f"{found[1] or 'run'} (second)"
    return found[0] or "first run", found[1] or "second run"
