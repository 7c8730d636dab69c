"""Extraction of the final answer of a worked text, marked by ####, a box, a phrase, tags, type or its position."""

from __future__ import annotations

import json
import re
from fractions import Fraction

from mixlens.endpoints.protocols import without_thinking
from mixlens.evals.readings import Found

NOTHING, LAST_LINE = Found("", "none"), "the last line"
_MINERVA = re.compile(r"[Tt]he final answer is:?\s*((?:(?!\n\n).)+?)\s*\.?\s*I hope it is correct", re.DOTALL)
# A Markdown heading may also begin like this, even with a number: "#### 1. The eggs".
_LEAD = r"(?:[^\w\n]|[A-Z]{1,3}\b\.?|[a-z]\b(?=\s*=)|Rs\.?|(?:a total of|exactly|about|is)\b){0,4}"  # before a number
_MARK = re.compile(rf"####(?![ \t]*\d+[.):][ \t]+[A-Za-z])[ \t]*(?={_LEAD}[\d\\.])([^\n]*\S)")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox|answer)\b\s*")
_TAGS = re.compile(r"<(answer|final_answer|result)>\s*(.*?)\s*</\1>", re.IGNORECASE | re.DOTALL)
_KEY = re.compile(r"""["'](?:final[_ ]?)?answer["']\s*:\s*("(?:[^"\\\n]|\\.)*"|-?[\d.]+)""", re.IGNORECASE)
_HTML = re.compile(r"</?(?:b|u|i|p|em|strong|span|div|br)\b[^<>\n]*>", re.IGNORECASE)
_LEADS = r"(?:[ \t]+[-–—>→]+[ \t]|[ \t]*\n|[^\n.!?:=(]{0,60}?(?:\bis\b|\bequals\b|\bare\b|[:=]))"
_CUE = re.compile(rf"(?<![^\W_])answer\b{_LEADS}|^[ \t]*(?:A|Ans)[ \t]*[:.]", re.IGNORECASE | re.MULTILINE)
_CLOSING = re.compile(rf"\b(?:result|solution|total|value|number|sum)\b{_LEADS}", re.IGNORECASE)  # of a last line
_REVERSED = re.compile(
    r"(?:^|[.!,:;]\s)(?:(?:so|thus|hence|therefore)\b,?)?([^\n]*?)\s+is (?:the|our|my) (?:final |correct )?answer\b",
    re.IGNORECASE,
)
_BEFORE = re.compile(r"[\s:=*_`#>]*(?:[-•]\s+)?")
_BOLD = re.compile(r"(?<![\w)*])(\*\*|__|\*)(?=\S)([^\n]+?)(?<=\S)\1(?![\w(*])")
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$(?![\s$])([^$\n]*?[^$\s\\])\$", re.DOTALL)
_SENTENCE = re.compile(r"[.!?](?=\s+[A-Z(]|\s*$)|\n|,? (?:so|because|since|which|where|I hope)\b")
_SEPARATOR = r"\{,\}|\\,|\\!|,\\!|\\ |[\u00a0\u2009\u202f\u2019']|(?<=\d),(?=\d{3})|[ ](?=000)"
_GAP = re.compile(rf"(?<=\d)(?:{_SEPARATOR})(?=\d{{3}}(?!\d))")
_VALUE = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3}\b|\s*/\s*\d+(?:\.\d+)?)?")
_POWER_OF_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[×·*x])\s*10\s*\^\s*\{?(-?\d{1,3})\}?")
_POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z}])\^\{?\d\}?")
_SPACED = re.compile(r"\D{0,4}\d{1,3}(?: \d{3})+\D*")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_WORDS = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf|textrm)\s*\{([^{}]*)\}")
_SIGNS = {
    "−": "-",
    "–": "-",
    "∞": r"\infty ",
    "π": r"\pi ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "×": r"\times ",
    "·": r"\cdot ",
}
_RAISED = str.maketrans({"²": "^2", "³": "^3", "°": r"^\circ"})
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|\w))")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅙": "1/6", "⅛": "1/8"}


def final_answer(text: str) -> Found:
    """Return the final answer of a worked text, verbatim; NOTHING if the text is empty.

    Tried in order: the sentence of Lewkowycz et al. 2022, the mark of GSM8K, the last box, the last tag, the last JSON
    key, the last phrase such as "the answer is", mathematics in the last line, the last line. Reasoning between <think>
    tags is ignored.
    """
    text = _HTML.sub("", without_thinking(text)[0] or text)
    if found := _MINERVA.search(text):
        return Found(_bare(found.group(1)), "the final answer is ... I hope it is correct")
    text = _BOLD.sub(r"\2", text)
    if found := _MARK.search(text):
        return Found(_bare(found.group(1)), "####")
    if (boxed := _last_box(text)) is not None:
        return Found(_bare(boxed), "box")
    if found := _last(_TAGS, text):
        return Found(_bare(found.group(2)), "tag")
    if found := _last(_KEY, text):
        return Found(_bare(_json_value(found.group(1))), "key of JSON")
    lines = [line for line in text.strip().split("\n") if line.strip(" \t*_`#-")]
    if not lines:
        return NOTHING
    if found := _last(_REVERSED, lines[-1]):
        return Found(_bare(found.group(1)), "is the answer")
    for cue, part in ((_CUE, text), (_CLOSING, lines[-1])):
        if clauses := [rest for found in cue.finditer(part) if (rest := _clause(part[found.end() :]))]:
            return Found(clauses[-1], "the answer is")
    found = _last(_MATH, text)
    if found is not None and (not text[found.end() :].strip(" .*\n") or found.start() >= text.rindex(lines[-1])):
        return Found(_bare(found.group(0)), "mathematics of the last line")
    return Found(_bare(lines[-1]), LAST_LINE)


def number_in(found: Found) -> str:
    """Return the number in a final answer without units, currency, separators or trailing zeros; "" if there is none.

    In an equation it is the side that is a single number. Otherwise it is the first number, or the last one in an
    unmarked last line.
    """
    text = _plain(found)
    outside = re.sub(r"\([^()]*\)", " ", text)
    text = outside if _VALUE.search(outside) else text
    sides = [_VALUE.findall(side) for side in re.split(r"=|≈|\\approx", text)]
    single = [numbers[0] for numbers in sides if len(numbers) == 1] if len(sides) > 1 else []
    last = sides[-1] or [number for numbers in sides for number in numbers]
    if not last:
        return ""
    unmarked = len(sides) == 1 and found.form == LAST_LINE
    return _written(single[-1] if single else last[-1] if unmarked else last[0])


def as_latex(result: str) -> str:
    """Return a result with Unicode symbols as LaTeX and without thousands separators."""
    for sign, latex in _SIGNS.items():
        result = result.replace(sign, latex)
    for sign, fraction in _VULGAR.items():
        result = result.replace(sign, "\\frac{{{}}}{{{}}}".format(*fraction.split("/")))
    result = _ROOT.sub(lambda m: f"\\sqrt{{{next(filter(None, m.groups()))}}}", result.translate(_RAISED))
    return _GAP.sub("", result)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


def _last_box(text: str) -> str | None:
    """Return the content of the last box, whose braces may be nested, missing, or unclosed."""
    found = _last(_BOX, text)
    if found is None:
        return None
    rest = text[found.end() :]
    depth = 0
    for place, character in enumerate(rest if rest.startswith("{") else ""):
        depth += {"{": 1, "}": -1}.get(character, 0) * (rest[place - 1 : place] != "\\")
        if depth == 0:
            return rest[1:place]
    unclosed = re.match(r"\{?\s*((?:\\?\$)?(?:(?!\\[\])])[^$\n])*)", rest)
    return unclosed.group(1) if unclosed else rest


def _json_value(text: str) -> str:
    """Return a JSON value as text; LaTeX commands in it may lack the second backslash."""
    if re.search(r"(?<!\\)\\[A-Za-z]{2}", text):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _clause(text: str) -> str:
    """Return the mathematics at the beginning of the text after a phrase, else the rest of the sentence."""
    text = text[_BEFORE.match(text).end() :]  # type: ignore[union-attr]
    if (found := _MATH.search(text)) and _SENTENCE.split(text[: found.start()])[0] == text[: found.start()]:
        return _bare(found.group(0))
    return _bare(_SENTENCE.split(text, maxsplit=1)[0])


def _bare(text: str) -> str:
    """Strip math delimiters, bold type, quotes, unmatched brackets and final punctuation."""
    before = None
    while before != text:
        before, text = text, text.strip().rstrip(".,;:!").strip("#*_`\"“”'").strip()
        if (found := _MATH.fullmatch(text)) is not None:
            text = next(filter(None, found.groups()))
        for opening, closing in (("{", "}"), ("([", ")]")):  # in an interval either bracket closes either
            if text[-1:] in (*closing,) and sum(map(text.count, closing)) > sum(map(text.count, opening)):
                text = text[:-1]
    return text


def _plain(text: str) -> str:
    """Rewrite the numbers of a clause in Python syntax."""
    text = text.replace("−", "-").replace("–", "-")
    text = _GAP.sub("", text.replace(" ", "") if _SPACED.fullmatch(text) else text)
    text = _POWER_OF_UNIT.sub("", _POWER_OF_TEN.sub(r"e\1", text))
    text = _WORDS.sub(r" \1 ", text)
    text = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    for sign, fraction in _VULGAR.items():
        text = text.replace(sign, fraction)
    return re.sub(r"(-?)\s*\\?[$€£¥₹]\s*(?=[-\d.])", r" \1", text)


def _written(number: str) -> str:
    """Return a number in its shortest exact form: an integer, else a decimal, else a fraction."""
    top, _, bottom = number.replace(" ", "").partition("/")
    try:
        value = Fraction(top) / Fraction(bottom or "1")
    except ZeroDivisionError:
        return number
    if value.denominator == 1:
        return str(value.numerator)
    short = f"{float(value):.12f}".rstrip("0")
    return short if Fraction(short) == value else str(value)
