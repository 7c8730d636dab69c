"""Relations between experts and domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Jackknife, Share, Smooth, leaving_out
from mixlens.stats.counts import Block, Counts, Reading, add_choices, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.multiplicity import with_survivors
from mixlens.stats.permutation import share_as_far, variances
from mixlens.stats.published import OLMOE
from mixlens.stats.structure import mutual_information_bits
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_PERMUTATIONS = 1000

# Separates the permutations from the bootstrap draws of any group.
_PERMUTATION_STREAM = 2**31


def domain_specialization(
    trace: Trace, *, by: str | Sequence[str] = "domain", cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the share of each domain's tokens that choose each expert.

    N_eD / N_D; k/E for uniform routing (Muennighoff et al. 2024, eq. 7). Sums to k over experts: k times
    `expert_share`.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; the column `by` of the sequences.
    by : str or Sequence[str], optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high, and p, q, survives against uniform routing ``[*by, layer, expert]``;
        n (tokens) ``[*by]``.

    Raises
    ------
    BadInput
        If `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.domain_specialization(trace)["estimate"].dims
    ('domain', 'layer', 'expert')
    """
    trace = clustered(trace, cluster)
    require(trace, "domain_specialization", "expert_id", bootstrap=bootstrap)
    data = summarise(
        choices(trace, by),
        lambda sums: Share(sums["chosen"], sums["n"]),
        {"expert": range(trace.n_experts)},
        bootstrap,
        null=trace.top_k / trace.n_experts,
    )
    return described(
        data, trace, bootstrap,
        statistic="domain_specialization", unit="fraction", uniform=trace.top_k / trace.n_experts,
        formula="N_eD / N_D", source=f"{OLMOE}, eq. 7",
    )  # fmt: skip


def domain_information(
    trace: Trace, *, by: str | Sequence[str] = "domain", cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the information, in bits, that a choice of expert carries about the domain.

    mutual_information
        sum_eD p(e, D) log2 (p(e, D) / (p(e) p(D))), p from the counts of all k slots.
    permuted
        its mean over 1000 random permutations of the domains of documents: the information due to chance. Its bounds
        hold the middle 95 % (the level) of the 1000 values.
    excess
        the difference, the measure to read. Its p is the share of permutations whose information, relative to its
        expectation from the variance within domains, is at least as large (Pauly, Brunner and Konietschke 2015).

    The intervals of mutual_information and excess are for the true mutual information, corrected for the upward bias of
    small samples, and extended to the estimate if necessary. Documents vary within their domain, whose size is taken as
    given; degrees of freedom follow Welch and Satterthwaite.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; the column `by` of the sequences.
    by : str or Sequence[str], optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (bits), ci_low, ci_high [layer, measure]; p, q (over layers), survives of excess, else NaN; n
        (tokens), n_documents; intervals are NaN if a domain has only one document.

    Raises
    ------
    BadInput
        If `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.domain_information(trace)["estimate"].dims
    ('layer', 'measure')
    """
    trace = clustered(trace, cluster)
    require(trace, "domain_information", "expert_id", bootstrap=bootstrap)
    counts = choices(trace, by)
    members = np.flatnonzero(counts.tokens > 0)
    chosen, group = counts.totals["chosen"][members], counts.clusters.group[members]
    estimate, low, high, p = np.full((4, trace.n_layers, 3), np.nan)
    if len(members):
        values = _information(chosen, group)
        every, ratio = _permuted(chosen, group, bootstrap.seed)
        chance = every[:, 1:]
        plain, baseline = values[:, 0], chance.mean(-1)
        excess = plain - baseline
        estimate = np.stack([plain, baseline, excess], axis=-1)
        p[:, 2] = share_as_far(ratio).max(0)
        if np.unique(group, return_counts=True)[1].min() > 1:
            within = Jackknife.within(values, counts.tokens[members], group)
            of_plain = Smooth(values, floor=0.0).bounds_of(within, bootstrap.level)
            less_chance = replace(within, estimate=excess, bias=within.bias - baseline)
            of_excess = Smooth(values).bounds_of(less_chance, bootstrap.level)
            of_chance = np.quantile(chance, [(1 - bootstrap.level) / 2, (1 + bootstrap.level) / 2], axis=-1)
            low, high = np.stack([of_plain, of_chance, of_excess], axis=-1)
    dims = ("layer", "measure")
    data = xr.Dataset(
        {
            "estimate": (dims, estimate),
            "ci_low": (dims, low),
            "ci_high": (dims, high),
            "n": int(counts.tokens.sum()),
            "n_documents": int(counts.n_documents.sum()),
        },
        coords={"layer": counts.layers, "measure": ["mutual_information", "permuted", "excess"]},
    )
    data = with_survivors(data, data["estimate"].copy(data=p), bootstrap.level)
    return described(
        data, trace, bootstrap,
        statistic="domain_information", unit="bits", uniform=0.0, by=list(counts.clusters.by),
        permutations=_PERMUTATIONS, seed=bootstrap.seed, interval=Smooth.how,
        formula="I(e; D) = sum_eD p(e, D) log2(p(e, D) / (p(e) p(D))), minus its mean under "
        "domains permuted over documents", source="Shannon 1948",
    )  # fmt: skip


def choices(trace: Trace, by: str | Sequence[str]) -> Counts:
    """Count the choices of each expert by each document, in any slot [document, layer, expert]."""

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        add_choices(block, totals["chosen"])

    shapes = {"chosen": (trace.n_layers, trace.n_experts)}
    return count(trace, by, shapes, Reading(("sequence", "expert_id")), add)


def _information(chosen: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the mutual information of expert and group [layer, 1 + document] from choices [document, layer, expert].

    The first entry is over all documents, the others without each.
    """
    groups = np.unique(group)
    found = []
    for of_layer in chosen.swapaxes(0, 1):
        own = np.where(group[:, None, None] == groups[:, None], of_layer[:, None], 0.0)
        found.append(mutual_information_bits(leaving_out(own)))
    return np.stack(found)


def _permuted(chosen: np.ndarray, group: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mutual information [layer, 1 + permutation], of the actual groups first, then of permuted documents.

    Also returns its ratio to chance, for both kinds of variance [2, layer, 1 + permutation].
    """
    rng = np.random.default_rng([seed, _PERMUTATION_STREAM])
    groups, flat, bits, ratios = np.unique(group), chosen.reshape(len(chosen), -1), [], []
    influence, sizes = influence_of_choices(chosen)
    for dealt in np.array_split(rng.permuted(np.tile(group, (1 + _PERMUTATIONS, 1)), axis=1), _PERMUTATIONS // 10):
        if not bits:
            dealt[0] = group
        members = (dealt[:, None] == groups[:, None]).astype(np.float64)
        joint = (members.reshape(-1, len(group)) @ flat).reshape(len(dealt), len(groups), *chosen.shape[1:])
        bits.append(mutual_information_bits(joint.transpose(2, 1, 3, 0)))
        share = members @ sizes / sizes.sum()
        of_groups = variances(influence, sizes, members.reshape(-1, len(group)))
        of_groups = of_groups.reshape(*of_groups.shape[:-1], len(dealt), len(groups))
        ratios.append(times_chance(bits[-1], (of_groups * share * (1 - share)).sum(-1), chosen))
    return np.concatenate(bits, axis=-1), np.concatenate(ratios, axis=-1)


def influence_of_choices(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the influence of each document on the share of each expert [layer, expert, document], and its choices."""
    sizes = chosen[:, 0].sum(-1)
    share = chosen.sum(0) / sizes.sum()
    return ((chosen - share * sizes[:, None, None]) / sizes.sum()).transpose(1, 2, 0), sizes


def times_chance(divergence: np.ndarray, variance: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """A divergence [layer, resample] over what shares [2, layer, expert, resample] of that variance yield by chance.

    To second order a divergence is the sum over experts of squared differences over shares.
    """
    share = chosen.sum(0)[..., None]
    chance = np.divide(variance, share, out=np.zeros_like(variance), where=share > 0).sum(-2)
    return np.divide(divergence, chance, out=np.zeros_like(chance), where=(chance > 0) & (divergence > 1e-12))
