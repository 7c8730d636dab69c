"""Impact of changed weights on a model, computed from sums per document."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Mean, Quantity, Share
from mixlens.core.run_dir import open_run
from mixlens.core.text import row, shown
from mixlens.errors import visible
from mixlens.stats.clusters import By
from mixlens.stats.measured import Measured, read_measured, summarised
from mixlens.stats.next_tokens import losses_of

KIND = "impact"
# Whose weights, and whose experts: the model's own, or those that the other model chose for the same tokens. The last
# is the first model in the dtype of the second, NaN if not measured.
CONDITIONS = ("a", "b", "b_routed_as_a", "a_routed_as_b", "a_cast")
MATRICES = ("w1", "w2", "w3")


class Impact:
    """A model `a` and a changed copy `b` on the same tokens, as measured by measure_impact.

    Methods take by=, a column of the documents to group by, and cluster=, a column such as "author" to cluster by if
    documents are not independent.

    sums   Dataset of sums over each document: loss, kl, same_top [document, condition]; same_first, shared
           [document, layer]; error, size (squared norms), chosen [document, layer, expert]; tokens (predicted), length
           [document]; and weight_error [layer, expert, matrix]
    meta   both models, settings, versions
    path   of the run directory, None in memory
    """

    kind = KIND

    def __init__(self, measured: Measured, *, path: Path | None = None) -> None:
        self.meta, self.path = measured.meta, path
        self.sums = _dataset(measured)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Impact:
        """Open the run at `path`. Raises RunError if it is missing, unfinished, or of another kind."""
        folder = open_run(path, KIND, check=check).path
        return cls(read_measured(folder, KIND, check=check), path=folder)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two models in tables: how their weights are stored, or else their names."""
        described = [self.meta["model"], self.meta["other"]]
        held = [str(one.get("audit", {}).get("label", "")) for one in described]
        called = [str(one["name"]).rsplit("/", 1)[-1] for one in described]
        for a, b in (held, called):
            if a != b:
                return a, b
        return "first", "second"

    def quality(self, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT) -> xr.Dataset:
        """Compare the predictions of both models on the same tokens, as stats.next_tokens with the exact divergence.

        kl
            mean KL(p_a || p_b) over the whole vocabulary, nats.

        Returns
        -------
        xarray.Dataset
            ``estimate``, ci_low, ci_high ``[*by, measure]``; n (predicted tokens) ``[*by]``.

        Raises
        ------
        BadInput
            If `by` or `cluster` names an unknown column.

        """

        def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
            loss, kl, same, n = (sums[name] for name in ("loss", "kl", "same_top", "n"))
            losses = losses_of(loss[:, 0], loss[:, 1], n)
            return {**losses, "same_top": Share(same[:, 1], n), "kl": Mean(kl[:, 1], n)}

        data = summarised(self.sums, ("loss", "kl", "same_top"), measures, {}, by, bootstrap, cluster=cluster)
        return self._described(
            data, bootstrap, statistic="quality", unit="nats",
            formula="-mean log p(t); exp of it; 1[argmax p_a = argmax p_b]; mean KL(p_a || p_b)",
        )  # fmt: skip

    def split(self, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT) -> xr.Dataset:
        """Split the change into the part due to changed choices of experts and the rest.

        With v(w, r) measured under the weights of w and the routing of r,
        weights_first   the rest v(b, a) - v(a, a), then routing v(b, b) - v(b, a)
        routing_first   routing v(a, b) - v(a, a), then the rest v(b, b) - v(a, b)
        mean            of the two orders (the Shapley value of both parts)
        In each order rest + routing = total = v(b, b) - v(a, a), exactly. The rest is called "weights" if both models
        compute in the same dtype with the same kinds of layers, else "everything else". Arithmetic, v of a cast to the
        dtype of b minus v(a, a), is the effect of the dtype alone; it is 0 for equal dtypes and excludes the rounding
        of quantized kernels.

        loss
            loss, nats per token.
        kl
            KL(p_a || p) of each condition's predictions, nats per token.
        other_top
            share of tokens with a different most probable next token.

        Returns
        -------
        xarray.Dataset
            ``estimate``, ci_low, ci_high ``[*by, quantity, order, part (weights or everything else, routing, total,
            arithmetic)]``; of loss also p, q, survives against no change, else NaN; n (predicted tokens) ``[*by]``;
            intervals are paired: all conditions read the same tokens.

        Raises
        ------
        BadInput
            If `by` or `cluster` names an unknown column.

        """

        def parts(sums: dict[str, np.ndarray]) -> Difference:
            values = np.stack([sums["loss"], sums["kl"], -sums["same_top"]], axis=1)
            aa, bb, ba, ab, cast = (values[:, :, i] for i in range(5))
            weights, routing = np.stack([ba - aa, bb - ab], axis=2), np.stack([bb - ba, ab - aa], axis=2)
            both = [np.concatenate([part, part.mean(2, keepdims=True)], axis=2) for part in (weights, routing)]
            arithmetic = np.broadcast_to((cast - aa)[:, :, None], both[0].shape)
            return Difference(np.stack([*both, both[0] + both[1], arithmetic], axis=3), sums["n"])

        dims = {
            "quantity": ["loss", "kl", "other_top"],
            "order": ["weights_first", "routing_first", "mean"],
            "part": [self.rest, "routing", "total", "arithmetic"],
        }
        null = np.array([0.0, np.nan, np.nan])[:, None, None]  # divergences and flips are never below 0
        data = summarised(self.sums, ("loss", "kl", "same_top"), parts, dims, by, bootstrap, null=null, cluster=cluster)
        return self._described(
            data, bootstrap, statistic="split", unit="nats", forced_weights=str(self.meta["force_weights"]),
            formula="v(b, a) - v(a, a), v(b, b) - v(b, a); v(a, b) - v(a, a), v(b, b) - v(a, b); mean of both",
        )  # fmt: skip

    @property
    def rest(self) -> str:
        """Name of the part of the change that is not routing: the weights, or everything else."""
        return "weights" if self.meta.get("same_arithmetic", False) else "everything else"

    def routing(
        self, *, by: By = None, pooled: bool = False, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> xr.Dataset:
        """Compute the agreement of both models' routing: top1 and overlap as stats.agreement ``[*by, layer, measure]``.

        pooled  the mean over layers ``[*by, measure]``
        """
        chosen = int(self.meta["top_k"])

        def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
            n = sums["n"]
            return {"top1": Share(sums["same_first"], n), "overlap": Share(sums["shared"], chosen * n)}

        names = ("same_first", "shared")
        sums = self.sums.assign({name: self.sums[name].mean("layer") for name in names}) if pooled else self.sums
        data = summarised(sums, names, measures, {}, by, bootstrap, tokens="length", cluster=cluster)
        return self._described(
            data, bootstrap, statistic="agreement", unit="fraction", formula="mean_t 1[e1 = e1']; mean_t |S and S'| / k"
        )

    def experts(self, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT) -> xr.Dataset:
        """Measure the change in weights and outputs of every expert.

        estimate
            sqrt(sum ||f_b(x) - f_a(x)||^2 / sum ||f_a(x)||^2) over the tokens that chose the expert in a, with the
            inputs from a for both.
        weight_error
            ||W_b - W_a|| / ||W_a|| (Frobenius) of each matrix, as used in computation.

        Returns
        -------
        xarray.Dataset
            ``estimate``, ci_low, ci_high, n (tokens that chose it) ``[*by, layer, expert]``; NaN if none did;
            weight_error [layer, expert, matrix], NaN if weights were offloaded.

        Raises
        ------
        BadInput
            If `by` or `cluster` names an unknown column.

        """

        def error(sums: dict[str, np.ndarray]) -> Mean:
            return Mean(sums["error"], sums["size"], through=np.sqrt)

        experts = self.sums.expert.values
        data = summarised(
            self.sums, ("error", "size"), error, {"expert": experts}, by, bootstrap, tokens="chosen", cluster=cluster
        )
        data = data.assign(weight_error=self.sums.weight_error)
        return self._described(
            data, bootstrap, statistic="expert_errors", unit="relative error",
            formula="sqrt(sum ||f_b(x) - f_a(x)||^2 / sum ||f_a(x)||^2); ||W_b - W_a||_F / ||W_a||_F",
        )  # fmt: skip

    def _described(self, data: xr.Dataset, bootstrap: Bootstrap, **attrs: Any) -> xr.Dataset:
        names = dict(zip(("model", "other"), self.names, strict=True))
        return data.assign_attrs({**attrs, "level": bootstrap.level, **names, "source": "measured by mixlens"})

    def overview(self) -> pd.DataFrame:
        """Return the main numbers, one per row: estimate, ci_low, ci_high, unit, n (tokens)."""
        quality, split = self.quality(), self.split().sel(quantity="loss", order="mean")
        a, b = self.names
        rows = {
            f"perplexity of {a}": row(quality.sel(measure="perplexity_a"), ""),
            f"perplexity of {b}": row(quality.sel(measure="perplexity_b"), ""),
            "loss, second less first": row(quality.sel(measure="loss_difference"), "nats per token"),
            f"of it from {'other weights' if self.rest == 'weights' else self.rest}": row(
                split.sel(part=self.rest), "nats per token"
            ),
            "of it from other routing": row(split.sel(part="routing"), "nats per token"),
            "of it from arithmetic alone": row(split.sel(part="arithmetic"), "nats per token"),
            "KL(first || second)": row(quality.sel(measure="kl"), "nats per token"),
            "same most probable next token": row(quality.sel(measure="same_top"), "fraction"),
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def title(self) -> str:
        """Return a title with the names and counts."""
        tokens, documents = int(self.sums.tokens.sum()), self.sums.sizes["document"]
        read = f"{tokens:,} predicted tokens of {documents:,} documents"
        return f"{self.names[0]} and {self.names[1]}: {read}; 95% intervals of paired differences, over documents"

    def __repr__(self) -> str:
        return visible(f"{self.title()}\n{shown(self.overview()).to_string()}")

    def _repr_html_(self) -> str:
        return f"<div><p>{html.escape(self.title())}</p>{shown(self.overview()).to_html(escape=True)}</div>"


def _dataset(measured: Measured) -> xr.Dataset:
    dims = {
        **dict.fromkeys(("loss", "kl", "same_top"), ("document", "condition")),
        **dict.fromkeys(("same_first", "shared"), ("document", "layer")),
        **dict.fromkeys(("error", "size", "chosen"), ("document", "layer", "expert")),
        **dict.fromkeys(("tokens", "length"), ("document",)),
    }
    arrays = measured.arrays
    missing = [(0, 0), (0, len(CONDITIONS) - arrays["loss"].shape[1])]  # older runs did not measure arithmetic
    arrays = arrays | {n: np.pad(arrays[n], missing, constant_values=np.nan) for n in ("loss", "kl", "same_top")}
    data: dict[str, Any] = {name: (along, arrays[name]) for name, along in dims.items()}
    data["weight_error"] = (("layer", "expert", "matrix"), arrays["weight_error"][0])
    coords = {
        "condition": list(CONDITIONS),
        "layer": measured.meta.get("layers", range(arrays["error"].shape[1])),
        "expert": range(arrays["error"].shape[2]),
        "matrix": list(MATRICES),
    }
    return measured.along_documents(data, coords, {"kind": KIND})
