from __future__ import annotations

import math

import pytest

from mixlens.stats import table5

# As in the paper's Table 5, percent: first choice at layers 0, 15, 31; first or second choice at the same layers.
PAPER = """
ArXiv            | 14.0 27.9 22.7 | 46.5 62.3 52.9
DM Mathematics   | 14.1 28.4 19.7 | 44.9 67.0 44.5
Github           | 14.9 28.1 19.7 | 49.9 66.9 49.2
Gutenberg        | 13.9 26.1 26.3 | 49.5 63.1 52.2
PhilPapers       | 13.6 25.3 22.1 | 46.9 61.9 51.3
PubMed Abstracts | 14.2 24.6 22.0 | 48.6 61.6 51.8
StackExchange    | 13.6 27.2 23.6 | 48.2 64.6 53.6
Wikipedia (en)   | 14.4 23.6 25.3 | 49.8 62.1 51.8
"""


def test_table5_is_that_of_the_paper():
    found = table5()
    lines = [line.split("|") for line in PAPER.strip().splitlines()]
    assert [line[0].strip() for line in lines] == list(found["domain"].values)
    for name, *choices in lines:
        for choice, row in zip(["first", "either"], choices, strict=True):
            for layer, percent in zip([0, 15, 31], row.split(), strict=True):
                value = found["estimate"].sel(domain=name.strip(), layer=layer, choice=choice).item()
                assert f"{100 * value:.1f}" == percent
    # By chance: 1 of 8 is the same again; 1 less the chance that none of two is among the other six of eight.
    assert found.attrs["uniform"] == pytest.approx([1 / 8, 1 - math.comb(6, 2) / math.comb(8, 2)], abs=5e-5)
    assert "2401.04088" in found.attrs["source"]
    assert "Table 5" in found.attrs["source"]
