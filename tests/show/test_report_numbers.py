"""Numbers of a report on a trace, read back from its page and held to loops over the arrays."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import loops
from helpers.displayed import Page, numbers
from helpers.traces import made

import mixlens as ml

CASE = made((9, 5, 7, 12, 6, 8, 11), layers=(0, 1, 3), experts=5, documents=("a", "b", "a", "c", "d", "e", "f"))
DOMAINS = sorted(set(CASE.sequences["domain"]))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return Page(ml.report(CASE.trace, tmp_path_factory.mktemp("report") / "r.html").read_text("utf-8"))


def table(page: Page, name: str) -> list[list[str]]:
    """Rows of the table that stands below a summary."""
    names = [text.removeprefix("Table: ") for text in page.texts("summary") if text.startswith("Table: ")]
    return page.tables[len(page.tables) - len(names) + names.index(name)]


def groups(domain: str | None = None) -> tuple[list[int], int]:
    tokens = loops.tokens_of(CASE, domain)
    return tokens, len({CASE.of_tokens("document_id")[t] for t in tokens})


def test_the_facts(page):
    facts = dict(zip(page.texts("dt")[:7], page.texts("dd")[:7], strict=True))
    assert (facts["tokens"], facts["sequences"], facts["documents"]) == ("58", "7", "6")
    assert (facts["values of domain"], facts["layers"], facts["experts"]) == ("3", "3", "5, top 2")


def test_shares_in_per_cent_with_their_counts(page):
    header, *rows = table(page, "Expert share")
    tokens, documents = groups()
    assert header == ["layer", *(f"expert {e}" for e in range(5)), "n", "documents"]
    for place, (layer, row) in enumerate(zip(CASE.layers, rows, strict=True)):
        assert row[0] == str(layer)
        assert (row[-2], row[-1]) == (str(len(tokens)), str(documents))
        for expert, cell in enumerate(row[1:-2]):
            share, low, high = numbers(cell.replace(" to ", " "))
            assert share == pytest.approx(100 * loops.share(CASE, place, expert, tokens, 2), abs=0.051)
            assert low <= share <= high


@pytest.mark.parametrize(("name", "times"), [("Expert share by domain", 1), ("Domain specialization", 2)])
def test_shares_by_domain(page, name, times):
    rows = iter(table(page, name)[1:])
    for domain in DOMAINS:
        tokens, documents = groups(domain)
        for place, layer in enumerate(CASE.layers):
            row = next(rows)
            assert row[:2] == [domain, str(layer)]
            assert row[-2:] == [str(len(tokens)), str(documents)]
            shown = [numbers(cell)[0] for cell in row[2:-2]]
            expected = [100 * times * loops.share(CASE, place, e, tokens, 2) for e in range(5)]
            np.testing.assert_allclose(shown, expected, atol=0.051)
    assert next(rows, None) is None


def test_balance_entropy_and_confidence(page):
    tokens, _ = groups()
    for place in range(3):
        shown = [[numbers(cell)[0] for cell in table(page, name)[1 + place][1:-2]]
                 for name in ("Load balance", "Routing entropy", "Router confidence")]  # fmt: skip
        bits = [loops.entropy_bits(loops.softmax(CASE.router_logits[t, place])) for t in tokens]
        np.testing.assert_allclose(shown[0], loops.balance(CASE, place, tokens), atol=6e-4)
        np.testing.assert_allclose(shown[1], [sum(bits) / len(bits)], atol=6e-4)
        np.testing.assert_allclose(shown[2], 100 * np.array(loops.confidence(CASE, place, tokens)), atol=0.06)


def test_repetition_by_domain(page):
    rows = iter(table(page, "Repetition")[1:])
    for domain in DOMAINS:
        tokens, documents = groups(domain)
        for place, layer in enumerate(CASE.layers):
            row = next(rows)
            assert row[:2] == [domain, str(layer)]
            assert row[-2:] == [str(len(loops.pairs(CASE, tokens))), str(documents)]
            expected = 100 * np.array(loops.repeated(CASE, place, tokens))
            np.testing.assert_allclose([numbers(cell)[0] for cell in row[2:-2]], expected, atol=0.051)


def test_pairs_of_experts_and_moves_between_layers(page):
    tokens, _ = groups()
    rows = iter(table(page, "Co-activation")[1:])
    for place, layer in enumerate(CASE.layers):
        for i in range(5):
            row, expected = next(rows), [loops.together(CASE, place, i, j, tokens) for j in range(5)]
            assert row[:2] == [str(layer), str(i)]
            assert row[-2] == str(sum(i in loops.of_experts(CASE, place, t) for t in tokens))
            for cell, value in zip(row[2:-2], expected, strict=True):
                assert (numbers(cell) or [np.nan])[0] == pytest.approx(100 * value, abs=0.051, nan_ok=True)
    moves = loops.moves(CASE, 0, 1, tokens)  # layers 1 and 3 are no neighbours
    for i, row in enumerate(table(page, "Transitions")[1:]):
        assert row[:2] == ["0", str(i)]
        assert row[-2] == str(int(moves[i].sum()))
        for cell, n in zip(row[2:-2], moves[i], strict=True):
            share = 100 * n / moves[i].sum() if moves[i].sum() else np.nan
            assert (numbers(cell) or [np.nan])[0] == pytest.approx(share, abs=0.051, nan_ok=True)
    [row] = table(page, "Mutual information between layers")[1:]
    assert numbers(row[1])[0] == pytest.approx(loops.information_bits(moves), abs=6e-4)


def test_shares_by_position(page):
    rows = iter(table(page, "Expert share by position")[1:])
    for name, low, high in (("0", 0, 1), ("1", 1, 2), ("2-3", 2, 4), ("4-7", 4, 8), ("8+", 8, 99)):
        inside = [t for t in loops.tokens_of(CASE) if low <= CASE.position[t] < high]
        for place, layer in enumerate(CASE.layers):
            row = next(rows)
            assert row[:2] == [name, str(layer)]
            assert row[-2] == str(len(inside))
            expected = [100 * loops.share(CASE, place, e, inside, 2) for e in range(5)]
            np.testing.assert_allclose([numbers(cell)[0] for cell in row[2:-2]], expected, atol=0.051)


def test_captions_count_what_their_figures_rest_on(page):
    by_domain = [len(groups(domain)[0]) for domain in DOMAINS]
    captions = page.texts("figcaption")
    whole = [text for text in captions if text.startswith("Share of assignments, all")]
    split = [text for text in captions if text.startswith("Share of assignments by domain")]
    assert [numbers(text.split("n = ")[1])[:2] for text in whole] == [[58, 6]]
    assert [numbers(text.split("n = ")[1])[:2] for text in split] == [[min(by_domain), max(by_domain)]]
    assert all("20 % of assignments" in text for text in (*whole, *split))
