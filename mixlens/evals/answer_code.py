"""The program in an answer, whatever the answer wraps it in: fences, words, tags, a console, or the prompt again."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`~]*)$")
_ONE_LINE = re.compile(r"(`{3,}|~{3,})[ \t]*(?:python\w*|py)?\b(.*?)\1", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(
    r"^[ \t]*[\[<]/?(?:python\d?|code|pre|py|begin|done|answer|solution)\b[^\]>\n]*[\]>][ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTE = re.compile(r"^[ \t]*>(?!>)[ \t]?", re.MULTILINE)
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[^\n]*\n?", re.MULTILINE)
_CODE = re.compile(r"(?:async[ ]+def|def|class|import|from|@\w|[A-Za-z_]\w*[ \t]*(?::[^=\n]+)?=)")
_MOST_CHARACTERS, _MOST_LINES = 1 << 18, 500


def program_in(answer: str, names: Collection[str], prompt: str = "") -> str:
    """A program that defines `names`: the first of many readings of `answer` that compiles and does.

    Readings that define the names themselves come first: fenced blocks (with those before them that compile), the text
    without its fences, tags, console prompts or indentation, and the lines of code between words. Then those that go on
    with `prompt`, whose last function lacks its body. The lines of the prompt before that function (imports, helpers)
    stand before an answer that repeats it. Where no reading will do it is the answer as it stands, which then fails.
    """
    text = answer.removeprefix("\ufeff").replace("\r\n", "\n")
    if len(text) > _MOST_CHARACTERS or not names:
        return prompt + text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes and comparisons in code that is no one's here
        for reading in _readings(text):
            if (tree := _parsed(reading)) and set(names) <= _defined(tree):
                return _futures_first(f"{_before(prompt, names)}\n{reading}" if prompt else reading)
        for reading in _bodies(text) if prompt else ():
            if (tree := _parsed(prompt + reading)) and _has_body(tree, names):
                return prompt + reading
    return prompt + text


def _before(prompt: str, names: Collection[str]) -> str:
    """The lines of a prompt before the function that it asks for."""
    asked = "|".join(map(re.escape, names))
    return re.split(rf"^(?:async[ ]+)?def[ ]+(?:{asked})\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]


def _readings(text: str) -> Iterator[str]:
    blocks, without = _blocks(text)
    whole = [block for block in blocks if _parsed(block)]
    yield from ("\n".join(whole[: i + 1]) for i in range(len(whole)))
    yield "\n".join(blocks)
    one_lines = (found.group(2) for found in _ONE_LINE.finditer(text))
    for one in (_TAG.sub("", without), text, without, *one_lines):
        yield one
        yield textwrap.dedent(one).strip("\n")
    yield _console(text)
    yield from _lines_of_code(_TAG.sub("", without))
    if "\u00a0" in text:
        yield from _readings(text.replace("\u00a0", " "))
    if _QUOTE.search(text):
        yield from _readings(_QUOTE.sub("", text))


def _bodies(text: str) -> Iterator[str]:
    blocks, without = _blocks(text)
    starts_indented = text.lstrip("\n")[:1] in (" ", "\t")
    first = re.split(r"^[ \t]*(?:`{3,}|~{3,})", text, maxsplit=1, flags=re.MULTILINE)[0]
    for one in (text, first, *blocks, without) if starts_indented else (*blocks, text, first, without):
        yield one
        yield textwrap.indent(textwrap.dedent(one), "    ")


def _blocks(text: str) -> tuple[list[str], str]:
    """What stands between fences, each with its own indentation taken away; and the text without lines of fences."""
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
    return [textwrap.dedent("\n".join(block)) for block in blocks], "\n".join(others)


def _console(text: str) -> str:
    """What was typed at Python's prompt."""
    typed = [line for line in map(str.lstrip, text.split("\n")) if re.match(r"(?:>>>|\.\.\.)(?: |$)", line)]
    return "\n".join(line[4:] for line in typed)


def _lines_of_code(text: str) -> Iterator[str]:
    """Runs of lines that compile, from each line that begins as code does, as long as can be."""
    lines = text.split("\n")[:_MOST_LINES]
    starts = [i for i, line in enumerate(lines) if _CODE.match(line)]
    for start in starts[:20]:
        for stop in range(len(lines), start, -1):
            run = "\n".join(lines[start:stop])
            if _parsed(run) is not None:
                yield run
                break


def _futures_first(program: str) -> str:
    futures = _FUTURE.findall(program)
    return "".join(f"{line.rstrip()}\n" for line in futures) + _FUTURE.sub("", program) if futures else program


def _parsed(program: str) -> ast.Module | None:
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _defined(tree: ast.Module | None) -> set[str]:
    """Names that the statements of a module bind, also under if, try and with."""
    found: set[str] = set()
    waiting: list[ast.stmt] = list(tree.body) if tree else []
    for statement in waiting:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
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
    """Whether the functions of these names do more than state what they would do."""
    functions = {s.name: s for s in tree.body if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef)}
    found = [functions[name].body for name in names if name in functions]
    return len(found) == len(names) and all(
        any(not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in body) for body in found
    )
