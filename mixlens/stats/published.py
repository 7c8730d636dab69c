"""Published routing figures of Mixtral, as Datasets comparable with a trace's own."""

from __future__ import annotations

import numpy as np
import xarray as xr

JIANG = "Jiang et al. 2024, Mixtral of Experts, arXiv 2401.04088"
OLMOE = "Muennighoff et al. 2024, OLMoE, arXiv 2409.02060"

# Percent: first choice at layers 0, 15, 31, then first or second choice at the same layers.
_TABLE_5 = {
    "ArXiv": (14.0, 27.9, 22.7, 46.5, 62.3, 52.9),
    "DM Mathematics": (14.1, 28.4, 19.7, 44.9, 67.0, 44.5),
    "Github": (14.9, 28.1, 19.7, 49.9, 66.9, 49.2),
    "Gutenberg": (13.9, 26.1, 26.3, 49.5, 63.1, 52.2),
    "PhilPapers": (13.6, 25.3, 22.1, 46.9, 61.9, 51.3),
    "PubMed Abstracts": (14.2, 24.6, 22.0, 48.6, 61.6, 51.8),
    "StackExchange": (13.6, 27.2, 23.6, 48.2, 64.6, 53.6),
    "Wikipedia (en)": (14.4, 23.6, 25.3, 49.8, 62.1, 51.8),
}


def table5() -> xr.Dataset:
    """Return the published rate at which consecutive tokens repeat their expert in Mixtral-8x7B.

    The counterpart of `repetition`: share of consecutive tokens with the same first choice ("first"), or with an
    expert in common among the first and second ("either"), in text of the Pile (Jiang et al. 2024, Table 5). The paper
    gives percent with one decimal and no intervals.

    Returns
    -------
    Dataset
        Estimate, a fraction [domain, layer, choice], for layers 0, 15 and 31.

    Examples
    --------
    >>> ml.stats.table5()["estimate"].dims
    ('domain', 'layer', 'choice')
    """
    values = np.array(list(_TABLE_5.values())).reshape(len(_TABLE_5), 2, 3).transpose(0, 2, 1) / 100
    return xr.Dataset(
        {"estimate": (("domain", "layer", "choice"), values)},
        coords={"domain": list(_TABLE_5), "layer": [0, 15, 31], "choice": ["first", "either"]},
        attrs={
            "statistic": "repetition",
            "unit": "fraction",
            "uniform": [0.125, 0.4643],
            "formula": "first: P(e1_t = e1_{t-1}); either: P(S_t and S_{t-1} have an expert in common)",
            "source": f"{JIANG}, Table 5",
            "model": "Mixtral-8x7B",
        },
    )


def two_engines() -> xr.Dataset:
    """Return the published rate at which two engines route the same tokens differently.

    About 10 % of router decisions, and about 94 % of tokens in at least one layer, differ between two engines (arXiv
    2510.11370), which gives no numbers of tokens and no intervals.

    Returns
    -------
    Dataset
        Estimate, a fraction [measure (routers, tokens)].

    Examples
    --------
    >>> float(two_engines()["estimate"].sel(measure="tokens"))
    0.94
    """
    return xr.Dataset(
        {"estimate": ("measure", [0.10, 0.94])},
        coords={"measure": ["routers", "tokens"]},
        attrs={"statistic": "flips", "unit": "fraction", "source": "arXiv 2510.11370"},
    )
