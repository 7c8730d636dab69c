"""Extraction of the program from an answer with fences, prose, tags, console prompts or a copy of the prompt."""

from __future__ import annotations

import ast
import html
import json
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

from mixlens.endpoints.protocols import without_thinking

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`~]*)$")
# A fence on the same line as code, after or before it.
_ENDS = re.compile(r"^(?![ \t]*(?:`{3}|~{3}))(.*[^\s`~])[ \t]*(`{3,}|~{3,})[ \t]*$", re.MULTILINE)
_BEGINS = re.compile(r"^([^\n`~]*(?:`{3,}|~{3,}))[ \t]*(?=(?:async[ ]+def|def|class|import|from)[ ]|@\w)", re.MULTILINE)
_SPECIAL = r"(?:<\|[\w ]{1,40}\|>|</?s>|<(?:eos|bos|end_of_turn)>)"
_SPECIALS = re.compile(rf"\A(?:\s*{_SPECIAL})+|(?:\s*{_SPECIAL})+\s*\Z")
_ONE_LINE = re.compile(r"(?<![`~])(```|~~~|`)(?:[ \t]*(?:python\w*|py)\b)?([^`\n]+)\1", re.IGNORECASE)
_TAG = re.compile(
    r"^[ \t]*(?:[\[<]/?(?:python\d?|code|pre|py|begin|done|answer|solution)\b[^\]>\n]*[\]>][ \t]*)+"
    r"|(?:[\[<]/(?:python\d?|code|pre|py|done|answer|solution)[\]>][ \t]*)+$"
    r"|^[ \t]*(?:python\d?|\\(?:begin|end)\{(?:verbatim|lstlisting|minted|python)\}\S*)[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTE = re.compile(r"^[ \t]*>(?!>)[ \t]?", re.MULTILINE)
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[^\n]*\n?", re.MULTILINE)
_CODE = re.compile(r"(?:async[ ]+def|def|class|import|from|@\w|[A-Za-z_]\w*[ \t]*(?::[^=\n]+)?=)")
_INPUT = re.compile(r"^[ \t]*(?:In ?\[\d*\]:|\.\.\.:|>>>|\.\.\.)(?: |$)")
_NUMBER = re.compile(r"^[ \t]*\d+(?:[ \t]*[:.|)])? ?", re.MULTILINE)
_ADDED = re.compile(r"^\+", re.MULTILINE)
_JSON = re.compile(r'^\s*"|[{\[]\s*["{\[]')
_ESCAPE = re.compile(r"\\([nt\"'\\])")
_LANGUAGE = re.compile(r"\A\s*(?:(?:python\d?|py|copy(?: code)?)[ \t]*\n)+", re.IGNORECASE)
_INVISIBLE = re.compile("[\u200b\u200c\u200d\u2060\ufeff]")
_BLANKS = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})
_DEFINITIONS = (ast.Pass, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_EFFECTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)
_MOST_CHARACTERS, _MOST_LINES, _MOST_STARTS = 1 << 18, 500, 30
AS_IT_STANDS = "as it stands"


class Program(NamedTuple):
    """A program and the form in which it was found in an answer."""

    source: str
    form: str


def program_in(answer: str, names: Collection[str], prompt: str = "") -> Program:
    """Return the first reading of `answer` that compiles and defines `names`.

    Complete readings are tried first: fenced blocks (with preceding ones that compile), and the text without fences,
    tags, console prompts or indentation. Then come lines of code between prose, and continuations of `prompt`, whose
    last function lacks its body. A method of a class is accepted if no function has its name; a line after the class
    binds it. If an answer repeats the function, the lines of the prompt before it (imports, helpers) are put before the
    answer. If no reading qualifies, the answer is returned unchanged, and will fail. Reasoning between <think> tags is
    ignored.
    """
    text = answer.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > _MOST_CHARACTERS or not names:
        return Program(prompt + text, AS_IT_STANDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes and comparisons in the model's code
        for form, source in _programs(list(_whole_texts(text)), names, prompt):
            return Program(_futures_first(source), form)
    return Program(prompt + text, AS_IT_STANDS)


def _programs(texts: Sequence[tuple[str, str]], names: Collection[str], prompt: str) -> Iterator[tuple[str, str]]:
    """Yield programs that define the names, the most reliable first, each with its form."""
    before = f"{_before(prompt, names)}\n" if prompt else ""
    for form, whole in texts:
        for part, reading in _whole_readings(whole):
            if (tree := _parsed(reading)) and set(names) <= _defined(tree):
                yield form + part, before + reading
    for form, whole in texts:
        for part, reading in _whole_readings(whole):
            if (tree := _parsed(reading)) and (bound := _methods(tree, names)):
                yield f"{form}methods of a class, {part}", f"{before}{reading}\n{bound}"
    for form, whole in texts:
        for part, reading in _readings_among_words(whole):
            if (tree := _parsed(reading)) and set(names) <= _defined(tree):
                yield form + part, before + reading
            if tree and (bound := _methods(tree, names)):
                yield f"{form}methods of a class, {part}", f"{before}{reading}\n{bound}"
        for part, reading in _bodies(whole) if prompt else ():
            if (tree := _parsed(prompt + reading)) and _has_body(tree, names):
                yield form + part, prompt + reading


def _whole_texts(text: str) -> Iterator[tuple[str, str]]:
    """Yield the text, then its contents if it is escaped HTML, a quotation, JSON, a numbered listing or a patch."""
    text = without_thinking(text)[0].strip("\n") or text
    text = _BEGINS.sub(r"\1\n", _ENDS.sub(r"\1\n\2", _SPECIALS.sub("", text)))
    yield "", text
    plain = _BLANKS.sub(" ", _INVISIBLE.sub("", text))
    if plain != text:
        yield "without invisible characters, ", plain
    if plain.translate(_QUOTES) != plain:
        yield "with typewriter's quotes, ", plain.translate(_QUOTES)
    text = plain
    if html.unescape(text) != text:
        yield "with HTML unescaped, ", html.unescape(text)
    if _QUOTE.search(text):
        yield "quoted, ", _QUOTE.sub("", text)
    for value in _json_texts(text):
        yield "in JSON, ", value
    if "\n" not in text.strip() and "\\n" in text:
        yield "with escaped line ends, ", _ESCAPE.sub(lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text)
    for form, mark in (("numbered lines, ", _NUMBER), ("lines of a patch, ", _ADDED)):
        if mark.search(text):
            yield form, mark.sub("", text)


def _json_texts(text: str) -> list[str]:
    """Return the texts in JSON that is the answer, a block of it, or surrounded by prose."""
    found: list[str] = []
    for part in (text, *_blocks(text)[0]):
        start = next((place.start() for place in _JSON.finditer(part)), None)
        if start is None:
            continue
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(part, start)
        except (ValueError, RecursionError):
            continue
        found += _strings(value)
    return found[:_MOST_STARTS]


def _strings(value: Any) -> list[str]:
    """Return every text in a JSON value; a list of lines, as in a notebook cell, is joined to one text."""
    if isinstance(value, str):
        return [value]
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if inner and isinstance(value, list) and all(isinstance(one, str) for one in inner):
        return ["".join(one if one.endswith("\n") else one + "\n" for one in inner)]
    return [text for one in inner for text in _strings(one)]


def _before(prompt: str, names: Collection[str]) -> str:
    """Return the lines of a prompt before the requested function."""
    asked = "|".join(map(re.escape, names))
    return re.split(rf"^(?:async[ ]+)?def[ ]+(?:{asked})\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]


def _whole_readings(text: str) -> Iterator[tuple[str, str]]:
    """Yield readings of the entire text or of entire blocks."""
    blocks, without = _blocks(text)
    whole = [block for block in blocks[:_MOST_STARTS] if _parsed(block)]
    for i in range(len(whole)):
        yield "fenced block" if i == 0 else "fenced blocks joined", "\n".join(whole[: i + 1])
    yield "fenced blocks joined", "\n".join(blocks)
    for form, one in (("bare", _TAG.sub("", without)), ("bare", text), ("bare", without)):
        yield form, one
        yield "indented", textwrap.dedent(one).strip("\n")
    for block in (*blocks[:_MOST_STARTS], text):
        yield "console", _console(block)


def _readings_among_words(text: str) -> Iterator[tuple[str, str]]:
    blocks, without = _blocks(text)
    for one in (*blocks[:_MOST_STARTS], _TAG.sub("", without)):
        for lines in _lines_of_code(one):
            yield "lines of code among words", lines
        for lines in _lines_of_code(textwrap.dedent(_indented_part(one))):
            yield "indented lines among words", lines
    for found in _ONE_LINE.finditer(text):
        yield "in a line", found.group(2).strip()


def _bodies(text: str) -> Iterator[tuple[str, str]]:
    blocks, without = _blocks(text)
    starts_indented = text.lstrip("\n")[:1] in (" ", "\t")
    first = re.split(r"^[ \t]*(?:`{3,}|~{3,})", text, maxsplit=1, flags=re.MULTILINE)[0]
    for one in (text, first, *blocks, without) if starts_indented else (*blocks, text, first, without):
        yield "body of the prompt", one
        yield "body of the prompt", textwrap.indent(textwrap.dedent(one), "    ")
        yield "body of the prompt", textwrap.indent(textwrap.dedent(one.expandtabs(4)), "    ")
        yield "body of the prompt, its first blanks lost", "    " + one.lstrip("\n")


def _indented_part(text: str) -> str:
    """Return indented lines after an empty one, as in Markdown code, except those of a class or a function."""
    shown: list[str] = []
    within, before = True, ""
    for line in text.split("\n"):
        if line[:1] not in ("", " ", "\t"):
            within = False
        elif not line.strip() and not within:
            within = not _CODE.match(before)
        if within:
            shown.append(line)
        before = line if line.strip() else before
    return "\n".join(shown)


def _blocks(text: str) -> tuple[list[str], str]:
    """Return the dedented contents of all fenced blocks, and the text without the fence lines."""
    blocks: list[list[str]] = []
    others: list[str] = []
    fence = ""
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if found and not fence:
            fence = found.group(1)
            blocks.append([])
        elif found and found.group(1).startswith(fence) and not found.group(2):
            fence = ""
        elif not found or fence:
            others.append(line)
            if fence:
                blocks[-1].append(line)
    return [_LANGUAGE.sub("", textwrap.dedent("\n".join(block))) for block in blocks], "\n".join(others)


def _console(text: str) -> str:
    """Return the input lines of a Python or IPython session."""
    return "\n".join(line[found.end() :] for line in text.split("\n") if (found := _INPUT.match(line)))


def _lines_of_code(text: str) -> Iterator[str]:
    """Yield, for each line that looks like code, the longest run of lines from there that compiles."""
    lines = text.split("\n")[:_MOST_LINES]
    starts = [i for i, line in enumerate(lines) if _CODE.match(line)]
    for start in starts[:_MOST_STARTS]:
        stop = len(lines)
        while stop > start:
            run = "\n".join(lines[start:stop])
            if _parsed(run) is not None:
                yield run
                break
            stop = min(stop, start + _first_bad_line(run)) - 1  # no longer run can compile


def _first_bad_line(program: str) -> int:
    try:
        ast.parse(program)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, MemoryError, RecursionError):
        return 1
    return len(program)


def _futures_first(program: str) -> str:
    futures = _FUTURE.findall(program)
    return "".join(f"{line.rstrip()}\n" for line in futures) + _FUTURE.sub("", program) if futures else program


def _parsed(program: str) -> ast.Module | None:
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _defined(tree: ast.Module | None) -> set[str]:
    """Return names bound by a module, also under if, try and with, except functions without a body."""
    found: set[str] = set()
    waiting: list[ast.stmt] = list(tree.body) if tree else []
    for statement in waiting:
        if isinstance(statement, ast.ClassDef) or (_is_function(statement) and not _is_stub(statement)):
            found.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).split(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found.update(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            waiting += [s for part in ("body", "orelse", "finalbody") for s in getattr(statement, part, [])]
    return found


def _has_body(tree: ast.Module, names: Collection[str]) -> bool:
    """Check whether the functions of these names are implemented."""
    functions = {s.name: s for s in tree.body if _is_function(s)}
    return all(name in functions and not _is_stub(functions[name]) for name in names)


def _methods(tree: ast.Module, names: Collection[str]) -> str:
    """Return lines that bind names to methods of the first class with all of them; "" if there is none."""
    for made in tree.body:
        if isinstance(made, ast.ClassDef):
            own = {statement.name for statement in made.body if _is_function(statement) and not _is_stub(statement)}
            if set(names) <= own:
                return "".join(f"{name} = {made.name}().{name}\n" for name in names)
    return ""


def _is_function(statement: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    return isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)


def _is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Check whether a function has no effect: only strings, values and unused definitions."""
    return all(
        isinstance(statement, _DEFINITIONS)
        or (isinstance(statement, ast.Raise) and "NotImplemented" in ast.unparse(statement))
        or (isinstance(statement, ast.Expr) and not any(isinstance(n, _EFFECTS) for n in ast.walk(statement)))
        for statement in function.body
    )
