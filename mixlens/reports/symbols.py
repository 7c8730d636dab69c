"""Meanings of symbols in formulas, for the methods section."""

from __future__ import annotations

import re
from collections.abc import Iterable

SYMBOLS = {
    "b": "a second run of the same tokens; a is the first",
    "bin": "a range of positions in the sequence",
    "cv": "coefficient of variation",
    "d": "a document",
    "D": "a domain, or another group of documents",
    "e": "an expert",
    "E": "the number of experts of a layer",
    "e1": "the expert that the router ranks first",
    "f": "f_e: the share of assignments of expert e",
    "gap": "the number of layers from one to the other",
    "H": "entropy in bits",
    "i": "an expert",
    "I": "mutual information in bits",
    "j": "another expert",
    "JS": "Jensen-Shannon divergence",
    "k": "the number of experts that a token chooses",
    "l": "a layer",
    "margin": "the router logit of the last expert chosen less that of the best one left out",
    "N": "a number of tokens; with an index, of those it names: N_e chose expert e, N_ij chose both i and j",
    "n": "a number of tokens that an estimate rests on",
    "p": "p_e: the router's probability of expert e; p_(1), p_(2): its largest two; p(e, D), p_ij: shares of tokens",
    "P": "a share of tokens; P_e is the mean probability of expert e; P(j | i) is the share of those with i",
    "S": "S_t: the set of experts that token t chooses",
    "sd": "standard deviation over experts",
    "t": "a token, by its place in the sequence",
    "token": "the identity of a token",
    "v": "the quantity that is compared",
    "w": "the weight of a chosen expert; w_1 of the first, w_2 of the second",
    "x": "a token type",
}
_WORD = re.compile(r"[A-Za-z]+\d?")


def symbols_of(formulas: Iterable[str]) -> dict[str, str]:
    """Return the symbols that occur in `formulas`, with their meanings."""
    used = {part for formula in formulas for word in _WORD.findall(formula) for part in (word, *_indexed(word))}
    return {symbol: meaning for symbol, meaning in SYMBOLS.items() if symbol in used}


def _indexed(word: str) -> Iterable[str]:
    """Yield the letters of an index such as "ij" or "eD", each a symbol."""
    return word if len(word) == 2 and word not in ("sd", "cv", "JS") else ()
