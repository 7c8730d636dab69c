"""Relations between weights and routing."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens.errors import BadInput


def similarity_and_coactivation(
    similarity: xr.DataArray, coactivation: xr.Dataset, *, permutations: int = 2000, seed: int = 0
) -> xr.Dataset:
    """Correlate the similarity of experts with their coactivation, tested by permuting experts.

    Pearson's r over all pairs i < j between similarity and (P(j|i) + P(i|j)) / 2. Pairs that share an expert are not
    independent, so the null distribution relabels the experts of one of the two matrices (Mantel 1967).

    Parameters
    ----------
    similarity : xarray.DataArray
        [layer, expert, expert_j], such as measure_similarity(model).router_cosine.
    coactivation : xarray.Dataset
        Result of stats.coactivation, with layer, expert and expert_j.
    permutations : int, optional
        Number of permutations of the experts.
    seed : int, optional
        Seed of the permutations.

    Returns
    -------
    Dataset
        R, null_low, null_high (2.5 % and 97.5 % of the permutations), p (two-sided), n (pairs) [layer].

    Raises
    ------
    BadInput
        If layers or experts differ, or an argument has another type.
    """
    if not isinstance(similarity, xr.DataArray) or not isinstance(coactivation, xr.Dataset):
        raise BadInput(
            f"Cannot compare a {type(similarity).__name__} with a {type(coactivation).__name__}. Pass one matrix of "
            "measure_similarity(model), such as its router_cosine, and the result of stats.coactivation.",
            argument="similarity",
            value=(type(similarity).__name__, type(coactivation).__name__),
        )
    together = coactivation["estimate"]
    wanted = {"layer", "expert", "expert_j"}
    if set(similarity.dims) != wanted or set(together.dims) != wanted:
        raise BadInput(
            f"Cannot compare similarity {similarity.dims} with co-activation {together.dims}: both need layer, expert "
            "and expert_j and nothing else. Select one matrix, or one domain, first.",
            argument="dims",
            value=(similarity.dims, together.dims),
        )
    if not np.array_equal(similarity.layer, together.layer) or similarity.sizes["expert"] != together.sizes["expert"]:
        raise BadInput(
            f"Cannot compare the similarity of layers {similarity.layer.values.tolist()} with the co-activation of "
            f"layers {together.layer.values.tolist()}: layers and experts must be the same. Select those that both "
            "have.",
            argument="layer",
            value=(similarity.layer.values.tolist(), together.layer.values.tolist()),
        )
    alike = similarity.transpose("layer", "expert", "expert_j").values
    chosen = together.transpose("layer", "expert", "expert_j").values
    chosen = (chosen + chosen.transpose(0, 2, 1)) / 2
    count = alike.shape[1]
    pairs = np.triu_indices(count, 1)
    random = np.random.default_rng(seed)
    labels = np.stack([random.permutation(count) for _ in range(permutations)])
    found = []
    for one, other in zip(alike, chosen, strict=True):
        r = float(_pearson(one[pairs][None], other[pairs])[0])
        null = _pearson(np.stack([one[np.ix_(order, order)][pairs] for order in labels]), other[pairs])
        extreme = (np.abs(null) >= abs(r) - 1e-12).sum() + 1
        p = extreme / (permutations + 1) if np.isfinite(r) else np.nan
        found.append((r, *np.nanquantile(null, [0.025, 0.975]), p) if np.isfinite(r) else (np.nan,) * 4)
    table = np.array(found).T
    data = {name: ("layer", row) for name, row in zip(("r", "null_low", "null_high", "p"), table, strict=True)}
    n = np.isfinite(chosen[:, pairs[0], pairs[1]]).sum(1)
    return xr.Dataset(
        data | {"n": ("layer", n)},
        {"layer": similarity.layer.values},
        {
            "statistic": "similarity_and_coactivation",
            "formula": "Pearson's r over pairs i < j; null: experts of one matrix relabelled",
            "source": "Mantel 1967",
            "permutations": permutations,
            "seed": seed,
            "model": coactivation.attrs.get("model", "unknown"),
        },
    )


def _pearson(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation of each row [n, pairs] with `other` [pairs], over the pairs known in both."""
    known = np.isfinite(other)
    rows, other = rows[:, known], other[known]
    rows, other = rows - rows.mean(1, keepdims=True), other - other.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return rows @ other / np.sqrt((rows**2).sum(1) * (other**2).sum())
