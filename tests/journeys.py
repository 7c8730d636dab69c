"""How far a reader has to go: files entered, functions, depth of calls and classes made, for what users do.

    python tests/journeys.py

Counts code of mixlens only. Depth is the largest number of its frames on the stack of one thread.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

import mixlens as ml

PACKAGE = str(Path(ml.__file__).parent)
QUIET = ml.RecordSettings(progress=False)


class Journey:
    """Follows calls into mixlens, in every thread, while it runs."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, str, int]] = set()
        self.classes: set[str] = set()
        self.of_thread = threading.local()
        self.deepest = 0

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or event not in ("call", "return"):
            return
        depth = getattr(self.of_thread, "depth", 0) + (1 if event == "call" else -1)
        self.of_thread.depth = depth
        if event == "return" or code.co_name in ("<module>", "<lambda>", "<genexpr>", "<listcomp>", "<dictcomp>"):
            return
        if frame.f_back is not None and code.co_flags & inspect.CO_NEWLOCALS and code.co_name == "__init__":
            self.classes.add(type(frame.f_locals.get("self")).__name__)
        self.files.add(code.co_filename)
        self.functions.add((code.co_filename, code.co_name, code.co_firstlineno))
        self.deepest = max(self.deepest, depth)

    def of(self, go: Callable[[Path], Any]) -> tuple[int, int, int, int]:
        go(Path(tempfile.mkdtemp(prefix="mixlens-journeys-")))  # what is imported only now would count as entered
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            go(Path(tempfile.mkdtemp(prefix="mixlens-journeys-")))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        return len(self.files), len(self.functions), self.deepest, len(self.classes)


def main() -> None:
    mpl.use("agg")
    documents = ml.demo_documents()[:8]
    model = ml.load("demo", verbose=False)
    trace = ml.record(model, documents, signals=["router_logits", "logprob"], settings=QUIET)
    share = ml.stats.expert_share(trace)
    quiet = ml.evals.EvalSettings(progress=False)
    local = ml.bench.LocalSettings(progress=False, warmup=0)
    load = {"requests": 1, "workload": ml.bench.Workload(16, 4), "settings": local}

    def edited(_: Path) -> None:
        with ml.edit(model, ml.edits.forbid(3, 5)):
            pass

    journeys: dict[str, Callable[[Path], Any]] = {
        "load": lambda _: ml.load("demo", verbose=False),
        "load, nf4": lambda _: ml.load("demo", quantization="nf4", verbose=False),
        "record to a folder": lambda folder: ml.record(model, documents, out=folder / "run", settings=QUIET),
        "stats.expert_share": lambda _: ml.stats.expert_share(trace),
        "show.expert_share": lambda _: ml.show.expert_share(share),
        "edit, forbid": edited,
        "evaluate": lambda _: ml.evaluate(model, ["demo"], limit=2, settings=quiet),
        "benchmark": lambda _: ml.benchmark(model, **load),
        "report": lambda folder: ml.report(trace, folder / "report.html"),
    }
    print("| journey | files | functions | depth | classes |\n|---|---|---|---|---|")
    for name, go in journeys.items():
        print(f"| {name} | {' | '.join(map(str, Journey().of(go)))} |")


if __name__ == "__main__":
    main()
