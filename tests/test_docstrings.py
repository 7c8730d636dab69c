"""Every public name is documented in numpydoc form, and its examples run."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpydoc.docscrape import ClassDoc, FunctionDoc

import mixlens as ml

PACKAGES = {"ml": ml} | {f"ml.{name}": getattr(ml, name) for name in (
    "stats", "show", "view", "edits", "bench", "evals", "experiments", "decisions", "pricing")}  # fmt: skip
TYPES = (ml.Trace, ml.evals.Log, ml.bench.Bench, ml.Comparison, ml.Recorder, ml.Endpoint, ml.Explorer, ml.view.View)


def _ours(member: Any) -> bool:
    return bool(member.__doc__) and str(getattr(member, "__module__", "")).startswith("mixlens")


def public() -> Iterator[tuple[str, Any]]:
    """Functions and classes of the front doors, each once, and the methods of the main classes."""
    found = {}
    for door, package in PACKAGES.items():
        for name in package.__all__:
            shown = getattr(package, name)
            if not inspect.ismodule(shown):
                found.setdefault(id(shown), (f"{door}.{name}", shown))
    for kind in TYPES:
        for name, member in inspect.getmembers(kind):
            if not name.startswith("_") and callable(member) and _ours(member):
                found.setdefault(id(member), (f"{kind.__name__}.{name}", member))
    yield from found.values()


PUBLIC = dict(public())
MADE = (ml.Trace, ml.bench.BenchComparison, ml.evals.LogComparison, ml.view.View)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    model = ml.load("demo", verbose=False)
    by_domain: dict[str, list[dict[str, str]]] = {}
    for document in ml.demo_documents():
        by_domain.setdefault(document["domain"], []).append(document)
    documents = [document for of_domain in by_domain.values() for document in of_domain[:2]]
    quiet = ml.RecordSettings(progress=False)
    trace = ml.record(model, documents, signals=["router_logits", "logprob", "top_logprobs"], settings=quiet)
    names = {"ml": ml, "np": np, "pd": pd, "model": model, "documents": documents, "trace": trace, "quiet": quiet}
    return names


@pytest.mark.parametrize("name", [name for name, shown in PUBLIC.items() if ">>>" in (shown.__doc__ or "")])
def test_its_examples_run(name, namespace, tmp_path):
    [test] = [t for t in doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={}) if t.examples]
    test.globs = {**namespace, "tmp": tmp_path}
    told: list[str] = []
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed = doctest.DocTestRunner(optionflags=options).run(test, out=told.append).failed
    assert not failed, "".join(told)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_documented(name):
    shown = PUBLIC[name]
    if inspect.isclass(shown) and (issubclass(shown, BaseException) or shown in MADE):
        return  # an error, or a class that nobody calls
    document = ClassDoc(shown, config={"show_class_members": False}) if inspect.isclass(shown) else FunctionDoc(shown)
    documented = {one.strip().lstrip("*") for entry in document["Parameters"] for one in entry.name.split(",")}
    try:
        parameters = inspect.signature(shown).parameters
    except ValueError:
        return
    missing = [p for p in parameters if p not in documented and p not in ("self", "cls")]
    assert not missing
    assert document["Summary"]
