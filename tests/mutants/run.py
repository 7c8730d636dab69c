"""make mutants: change one place of the library, run the tests that run it, and see whether one of them fails.

    python tests/mutants/run.py [--n 300] [--seed 0] [--seconds 60] [--keep] [--survivors]

Each mutant is written to a copy of the tree; a fork of a process that holds torch and transformers imports the library
from there, and runs at most --seconds of the tests that run the line: first those of its own folder, and the quickest.
A mutant that no test fails on has survived, unless equivalent.jsonl says why no test could. --keep takes the lines each
test runs from the last time, and --survivors only tries those again that survived then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import pytest
from places import Mutant, lines_around, modules, sample
from tested_lines import TestedLines

ROOT = Path(__file__).parents[2]
OUT = ROOT / "out" / "mutants"
HEAVY = (
    *("torch", "transformers", "transformers.models.mixtral.modeling_mixtral", "datasets", "safetensors.torch"),
    *("lm_eval.evaluator", "lm_eval.tasks", "matplotlib.pyplot", "pandas", "xarray", "scipy.stats", "scipy.optimize"),
    *("pyarrow.parquet", "hypothesis.strategies", "hypothesis.extra.numpy", "httpx", "anywidget", "duckdb"),
)
NOTICED, SURVIVED = "noticed", "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of tests, at most, for each mutant")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="the lines that each test runs, from the last time")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last time")
    asked = parser.parse_args()

    OUT.mkdir(parents=True, exist_ok=True)
    trees = [_copy(OUT / f"tree-{i}") for i in range(asked.workers)]
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    results = OUT / f"seed-{asked.seed}.jsonl"
    mutants = sample(ROOT, asked.n, asked.seed)
    if asked.survivors:
        lived = {(r["file"], r["old"], r["new"]) for r in _read(results) if r["result"] == SURVIVED}
        mutants = [m for m in mutants if (m.file, m.old, m.new) in lived]
    if not asked.keep:
        _measure(trees)
    tests = Tests([json.loads((OUT / f"lines-{i}.json").read_text()) for i in range(asked.workers)])
    results.write_text("")
    _in_forks(trees, lambda i, tree: _try_all(tree, mutants[i :: len(trees)], tests, asked.seconds, results))
    _summary(_read(results), asked)


def _copy(tree: Path) -> Path:
    """The files that git would know, changed ones as they are, with the corpus beside them where it is here."""
    shutil.rmtree(tree, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    shared = ROOT.parent / "shared"
    if shared.exists() and not (tree.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(shared)
    return tree


def _in_forks(trees: list[Path], work) -> None:
    children = []
    for i, tree in enumerate(trees):
        if not (child := os.fork()):
            with _exit_after():
                os.chdir(tree)
                sys.path[:0] = [str(tree)]
                os.environ["PYTHONPATH"] = str(tree)
                work(i, tree)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0, "a worker failed: see above"


@contextlib.contextmanager
def _exit_after():
    status = 1
    try:
        yield
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def _measure(trees: list[Path]) -> None:
    """Run all unmarked tests once, a share of the files in each tree, and note the lines that each runs."""
    files = sorted(trees[0].glob("tests/**/test_*.py"), key=lambda path: -path.stat().st_size)
    names = [str(path.relative_to(trees[0])) for path in files]

    def share(i: int, tree: Path) -> None:
        with (OUT / f"measured-{i}.txt").open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            plugin = TestedLines(tree, modules(tree), OUT / f"lines-{i}.json")
            pytest.main([*names[i :: len(trees)], "--basetemp", str(OUT / f"tmp-{i}")], plugins=[plugin])

    _in_forks(trees, share)
    subprocess.run([sys.executable, "-m", "compileall", "-q", *(str(tree / "mixlens") for tree in trees)], check=True)


class Tests:
    """Which tests can notice a change of a line, in the order in which they are run."""

    def __init__(self, measured: list[dict]) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.of_file: dict[str, set[str]] = defaultdict(set)
        failed = {test for part in measured for test in part["failed"]}
        if failed:
            print(f"{len(failed)} tests fail without a mutant, and are left out: {', '.join(sorted(failed))}")
        for part in measured:
            self.seconds |= {test: s for test, s in part["seconds"].items() if test not in failed}
            for file, lines in part["lines"].items():
                for line, tests in lines.items():
                    self.lines[file][int(line)] |= set(tests) - failed
        for test in self.seconds:
            self.of_file[test.split("::")[0]].add(test)

    def noticing(self, mutant: Mutant) -> list[str]:
        """Those that run the line; then the others of their files, which may read what they computed."""
        statement, holder = lines_around((ROOT / mutant.file).read_text("utf-8"), mutant.line)
        running = self._running(mutant.file, statement) or self._running(mutant.file, holder)
        running = running or self._running(mutant.file, range(10**6))
        beside = {other for test in running for other in self.of_file[test.split("::")[0]]} - running
        folder = str(Path("tests") / Path(mutant.file).parent.relative_to("mixlens"))

        def order(test: str) -> tuple:
            return not test.startswith(folder), self.seconds[test]

        return [*sorted(running, key=order), *sorted(beside, key=order)]

    def _running(self, file: str, lines: range) -> set[str]:
        return {test for line, tests in self.lines[file].items() if line in lines for test in tests}

    def batches(self, mutant: Mutant, seconds: float) -> list[list[str]]:
        """The first few, and all that there is time for."""
        few: list[str] = []
        many: list[str] = []
        for test in self.noticing(mutant):
            cost = self.seconds[test] + 0.05
            if cost > seconds:
                continue
            seconds -= cost
            files = {name.split("::")[0] for name in few}
            early = len(few) < 40 and (len(files) < 3 or test.split("::")[0] in files)
            (few if early else many).append(test)
        return [batch for batch in (few, many) if batch]


def _try_all(tree: Path, mutants: list[Mutant], tests: Tests, seconds: float, results: Path) -> None:
    for mutant in mutants:
        path = tree / mutant.file
        before = path.read_bytes()
        began = time.monotonic()
        path.write_text(mutant.code(ROOT), "utf-8")
        try:
            batches = tests.batches(mutant, seconds)
            by = next((by for batch in batches if (by := _first_failure(tree, batch, tests))), None)
        finally:
            path.write_bytes(before)
        found = asdict(mutant) | {
            "result": NOTICED if by else SURVIVED,
            "by": by,
            "tests": sum(map(len, batches)),
            "seconds": round(time.monotonic() - began, 1),
        }
        with results.open("a") as out:
            out.write(json.dumps(found) + "\n")


class OnlyThese:
    """Runs some tests of the files given, in their order, and notes the first that fails."""

    def __init__(self, tests: list[str], note: Path) -> None:
        self.place, self.note = {test: i for i, test in enumerate(tests)}, note

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.note.write_text(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.note.write_text(report.nodeid)


def _first_failure(tree: Path, tests: list[str], known: Tests) -> str | None:
    """The test that fails, or what else ended the run: nothing may hang or fill the machine."""
    note = tree.with_name(f"{tree.name}-failed.txt")
    note.write_text("")
    limit = 30 + 5 * sum(known.seconds[test] for test in tests)
    if not (child := os.fork()):
        with _exit_after():
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
            resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            with open(tree.with_name(f"{tree.name}-output.txt"), "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            files = list(dict.fromkeys(test.split("::")[0] for test in tests))
            temporary = ["--basetemp", str(tree.with_name(f"{tree.name}-tmp"))]
            options = ["-x", "-p", "no:cacheprovider", *temporary]
            code = pytest.main([*files, *options], plugins=[OnlyThese(tests, note)])
            if code and not note.read_text():
                note.write_text(f"pytest ends with {int(code)}")
    ended = time.monotonic() + 4 * limit
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < ended:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not done[0]:
        os.waitpid(child, 0)
        return "it hangs"
    return note.read_text() or (f"it ends with {done[1]}" if done[1] else None)


def _summary(found: list[dict], asked: argparse.Namespace) -> None:
    equivalent = _read(Path(__file__).with_name("equivalent.jsonl"))
    counted, same, lived = 0, [], []
    for result in found:
        reason = next((e["reason"] for e in equivalent if _is(result, e)), None)
        if result["result"] == SURVIVED and reason:
            same.append(result | {"reason": reason})
            continue
        counted += 1
        if result["result"] == SURVIVED:
            lived.append(result)
    for title, group in (("Survived", lived), ("Equivalent", same)):
        print(f"\n{title}: {len(group)}")
        for r in sorted(group, key=lambda r: (r["file"], r["line"])):
            print(f"  {r['file']}:{r['line']} {r['operator']} ({r['tests']} tests)\n    - {r['old']}\n    + {r['new']}")
            if "reason" in r:
                print(f"    {r['reason']}")
    noticed = counted - len(lived)
    low, high = _wilson(noticed, counted)
    text = f"noticed {noticed} of {counted} ({noticed / max(counted, 1):.1%}, 95 % from {low:.1%} to {high:.1%})"
    print(f"\nseed {asked.seed}: {text}, {len(same)} more are equivalent")
    summary = {"seed": asked.seed, "n": counted, "noticed": noticed, "interval": [low, high], "equivalent": len(same)}
    (OUT / f"seed-{asked.seed}-summary.json").write_text(json.dumps(summary) + "\n")


def _is(result: dict, entry: dict) -> bool:
    return fnmatch(result["file"], entry["file"]) and (result["old"], result["new"]) == (entry["old"], entry["new"])


def _wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    if not n:
        return 0.0, 1.0
    middle, half = k + z * z / 2, z * (k * (n - k) / n + z * z / 4) ** 0.5
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
