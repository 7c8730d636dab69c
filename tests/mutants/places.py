"""Mutants of one place each, made by the operators of cosmic-ray; and what has to run to notice them.

A place is a piece of source text that operators can change. One mutant is drawn per place: a sum, for which cosmic-ray
has eleven other operators, counts no more than a True.
"""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

MODULES = [
    "mixlens/stats/*.py",
    "mixlens/trace/*.py",
    "mixlens/interventions/*.py",
    "mixlens/recording/*.py",
    "mixlens/experiments/ablator.py",
    "mixlens/core/bootstrap.py",
    "mixlens/core/run_dir.py",
    "mixlens/bench/metrics.py",
    "mixlens/bench/comparison.py",
    "mixlens/bench/sweep.py",
    "mixlens/evals/scoring.py",
    "mixlens/evals/code_scorer.py",
    "mixlens/evals/lm_eval_grading.py",
    "mixlens/evals/paired.py",
]
PAIRS = ["min max", "minimum maximum", "argmin argmax", "any all", "floor ceil", "zeros ones"]
OTHER = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}


class SwapName(Operator):
    """min for max, any for all, and the like, which cosmic-ray lacks."""

    def mutation_positions(self, node):
        if node.type == "name" and node.value in OTHER:
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = OTHER[node.value]
        return node

    @classmethod
    def examples(cls):
        return ()


class SwapIn(Operator):
    """`in` for `not in` and back, which cosmic-ray lacks."""

    def mutation_positions(self, node):
        if node.type == "keyword" and node.value == "in" and node.parent.type == "comparison":
            yield node.start_pos, node.end_pos
        if node.type == "comp_op" and node.children[0].value == "not":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        if node.type == "comp_op":
            node.children[0].value = ""
        else:
            node.value = "not in"
        return node

    @classmethod
    def examples(cls):
        return ()


def operators() -> dict[str, Operator]:
    """All of cosmic-ray that need no arguments, but those that trade equality for identity: 3 is 3, most often."""
    known = OperatorProvider()
    found = {name: known[name] for name in known if not known[name].arguments()}
    same = {name for name in found if name.startswith("ReplaceComparison") and name.count("_Is") == 1}
    return {name: op() for name, op in found.items() if name not in same} | {"SwapName": SwapName(), "SwapIn": SwapIn()}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    operator: str
    occurrence: int
    old: str  # the line before and after
    new: str

    def code(self, root: Path) -> str:
        return mutate_code((root / self.file).read_text("utf-8"), operators()[self.operator], self.occurrence)


def modules(root: Path) -> list[str]:
    found = []
    for pattern in MODULES:
        paths = sorted(root.glob(pattern))
        assert paths, f"no file is named {pattern}: bring MODULES up to date"
        found += [str(path.relative_to(root)) for path in paths]
    return found


def sample(root: Path, n: int, seed: int) -> list[Mutant]:
    """n mutants at n places drawn from all modules alike."""
    places = [(file, start, way) for file in modules(root) for start, way in _places(root / file)]
    draw = random.Random(seed)
    draw.shuffle(places)
    found: list[Mutant] = []
    for file, (line, _), ways in places:
        if len(found) == n:
            break
        source = (root / file).read_text("utf-8")
        operator, occurrence = draw.choice(ways)
        try:
            changed = mutate_code(source, operators()[operator], occurrence)
        except AttributeError:  # cosmic-ray on `except module.Error`
            continue
        if changed == source or not _compiles(changed):
            continue
        pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
        old, new = next((a.strip(), b.strip()) for a, b in pairs if a != b)
        found.append(Mutant(file, line, operator, occurrence, old, new))
    return found


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _places(path: Path) -> Iterator[tuple[tuple[int, int], list[tuple[str, int]]]]:
    """(where a place starts, [(operator, occurrence), ...]), but for types, bare stars and the words of errors."""
    source = path.read_text("utf-8")
    left_out = list(_not_code(ast.parse(source)))
    ways: dict[tuple, list] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    ops = operators()
    for node in ast_nodes(get_ast(source)):
        star = node.type == "operator" and node.parent.type in ("parameters", "param")  # what is given by name alone
        for name, operator in ops.items():
            for place in operator.mutation_positions(node):
                if not star:
                    ways[place].append((name, seen[name]))
                seen[name] += 1
    for (start, end), found in ways.items():
        if not any(a <= start and end <= b for a, b in left_out):
            yield start, found


def _not_code(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of what is there for types alone, and of texts of errors, which no test pins."""
    for node in ast.walk(tree):
        inside: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            inside = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            inside = [node.returns]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inside = [node.test]
        elif isinstance(node, ast.Raise):
            inside = [part for part in ast.walk(node) if isinstance(part, ast.JoinedStr)]
        for part in filter(None, inside):
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def lines_around(source: str, line: int) -> tuple[range, range]:
    """Lines of the statement at a line, without its body; and those of the function or class that it stands in."""
    statement, holder = range(line, line + 1), range(1, source.count("\n") + 2)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= node.end_lineno:
            continue
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            holder = range(start, node.end_lineno + 1)
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if body else node.end_lineno
        if line <= max(end, node.lineno):
            statement = range(start, max(end, node.lineno) + 1)
    return statement, holder
