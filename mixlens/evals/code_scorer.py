"""Grading of model-written programs for HumanEval and MBPP, run in parallel sandboxes.

Task files refer to these functions: a `custom` filter runs all answers of a task at once, so that the sandboxes share
the cores, and `passed` reads the results.
"""

from __future__ import annotations

import builtins
import re
import symtable
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mixlens.evals.answer_code import Program, program_in
from mixlens.evals.readings import Graded
from mixlens.evals.sandbox import Check, CodeResult, Limits, run_checks

# The slowest reference solution of MBPP (task 123) needs 3 s on an idle core.
LIMITS = Limits(seconds=30.0)


def humaneval(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[Graded]]:
    """Grade the answers of a base model, which continue the prompt: 1.0 if both together pass the check, else 0.0."""
    return _run(answers, documents, lambda a, d: _check(Program(d["prompt"] + a, "continues the prompt"), d))


def humaneval_chat(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[Graded]]:
    """Grade the answers of an instruct model, whose code repeats the function or continues it: 1.0 or 0.0."""
    return _run(answers, documents, lambda a, d: _check(program_in(a, (d["entry_point"],), d["prompt"]), d))


def mbpp(answers: Sequence[Sequence[str]], documents: Iterable[Mapping[str, Any]]) -> list[list[Graded]]:
    """Grade the answers on their own: 1.0 if every test of the problem passes after its setup code, else 0.0."""

    def check(answer: str, document: Mapping[str, Any]) -> tuple[Check, str]:
        tests = "\n".join([document["test_setup_code"], *document["test_list"]])
        names, modules = names_tested(tests)
        imports = "".join(f"import {name}\n" for name in modules)
        program = program_in(answer, names)
        return Check(program.source, tests, names, helpers=imports), program.form

    return _run(answers, documents, check)


def passed(references: Sequence[Any], predictions: Sequence[Any], **_: Any) -> float:
    """Return pass@1 of one problem: the fraction of its answers that passed (Chen et al. 2021, with k = 1)."""
    outcomes = [outcome for one in predictions for outcome in (one if isinstance(one, list | tuple) else [one])]
    return sum(map(float, outcomes)) / len(outcomes)


def names_tested(tests: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names that tests take from an answer, and the modules that they use.

    These are the names that tests neither define nor find in Python. An answer may have the name of a built-in function
    (`sum` in MBPP's task 126): if tests use no other names, the built-in functions that they call are those of the
    answer.
    """
    try:
        table = symtable.symtable(tests, "<tests>", "exec")
    except SyntaxError:  # reported when the tests run
        return (), ()
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    own |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_namespace()}
    used = _globals_of(table) - own
    others = used - set(dir(builtins))
    modules = {name for name in others & sys.stdlib_module_names if not re.search(rf"(?<![\w.]){name}\b(?!\.)", tests)}
    return tuple(sorted(others - modules or used)), tuple(sorted(modules))


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    top = table.get_type() == "module"
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return found.union(*(_globals_of(child) for child in table.get_children()))


def _check(program: Program, document: Mapping[str, Any]) -> tuple[Check, str]:
    """Return the check of HumanEval, whose tests may use complete functions of the prompt, here as helpers."""
    name = document["entry_point"]
    tests = f"{document['test']}\ncheck({name})\n"
    return Check(program.source, tests, (name,), helpers=f"{document['prompt']}\n    pass\n"), program.form


def _run(
    answers: Sequence[Sequence[str]],
    documents: Iterable[Mapping[str, Any]],
    check: Callable[[str, Mapping[str, Any]], tuple[Check, str]],
) -> list[list[Graded]]:
    checks = [[check(answer, d) for answer in given] for given, d in zip(answers, documents, strict=True)]
    results = iter(run_checks([one for several in checks for one, _ in several], limits=LIMITS))
    return [[_graded(next(results), form) for _, form in several] for several in checks]


def _graded(result: CodeResult, form: str) -> Graded:
    return Graded(result.passed, form=form, outcome=result.outcome)
