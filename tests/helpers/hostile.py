"""Names that a page, a figure, a table or a terminal could take for something else, and what must become of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from helpers.displayed import Page

MARKUP = "<script>alert(1)</script>"
NAMES = {
    "script": MARKUP,
    "closing": "</script></title></pre><img src=x onerror=alert(2)>",
    "quotes": "\"onmouseover='alert(3)' x=\"",
    "entity": "a &amp; b &lt;b&gt; & c",
    "backticks": "`code` *bold* [link](javascript:alert(4))",
    "formula": r"$\frac{a}{b}$ 5 % #1 a_b^c ~",
    "latex": r"\input{x} \\ & {",
    "pipe": "a | b \\| c",
    "lines": "two\nlines",
    "right to left": "\u202egnp.exe \u05e9\u05dc\u05d5\u05dd",
    "nul": "a\x00b",
    "terminal": "\x1b[31mred\x1b[0m\x07",
    "long": "w" * 3000,
}
_OF_OURS = {"onerror", "onmouseover", "onload", "onclick"}


def harmless(html: str, *names: str, scripts: int = 0) -> Page:
    """A page in which none of the names is markup, and each is still read; gives the page."""
    page = Page(html)
    assert len(page.of("script")) == scripts
    for one in page.elements:
        assert not _OF_OURS & set(one.attributes)
        assert one.attributes.get("src") != "x"
        assert not str(one.attributes.get("href", "")).startswith("javascript:")
    shown = page.text + " ".join(str(v) for one in page.elements for v in one.attributes.values())
    for name in names:
        assert name.replace("\r", "\n") in shown, name
    return page


def plain_in_a_terminal(text: str) -> bool:
    """Nothing that moves a cursor, rings a bell or turns the direction of reading."""
    return all(c.isprintable() or c in "\n" for c in text)


# What stands in a file or an answer where something else should.
VALUES = (
    None, True, 0, -1, 2**31, 10**30, -(10**400), 0.5, float("nan"), float("inf"), "", "5", "\x1b[31m", [], [[]],
    [None], [True], ["1"], [10**30], [-1], {}, {"a": 1}, "AAAA", "[" * 100_000,
)  # fmt: skip


def replaced(value: Any, new: Any) -> Iterator[Any]:
    """JSON with each of its parts, one at a time, replaced."""
    yield new
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            for other in replaced(part, new):
                changed = value.copy()
                changed[key] = other
                yield changed
