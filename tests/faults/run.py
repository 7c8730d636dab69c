"""Try to break mixlens, and print what was tried, what held and what failed: `make faults`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from kills import at_every_operation, at_random  # noqa: E402
from limits import LIMITS, full_disk, limited, refused  # noqa: E402
from tampering import damages, edits, strays  # noqa: E402
from verbs import RUNS, VERBS  # noqa: E402

# What was tried, and what was wrong: None where it held.
Tried = tuple[object, str | None]
DISKS = (40, 80, 160, 320)


def attempts(verbs: Iterable[str], n_random: int, *, every: int = 1, seed: int = 0) -> Iterator[tuple[str, Callable]]:
    """(a line of the table, what tries it in a folder)."""
    verbs = list(verbs)
    for verb in verbs:
        yield f"{verb}: killed before an operation on the disk", partial(at_every_operation, verb, every=every)
    for number, verb in enumerate(verbs if n_random else []):
        n = n_random // len(verbs) + (number < n_random % len(verbs))
        yield f"{verb}: killed at random", partial(at_random, verb, n=n, seed=seed)
    for verb in (verb for verb in verbs if verb in RUNS):
        yield f"{verb}: files changed", partial(_of_finished, verb, damages)
        yield f"{verb}: files added", partial(_of_finished, verb, strays)
        yield f"{verb}: meta.json edited", partial(_of_finished, verb, edits)
    for verb in verbs:
        for what in LIMITS:
            yield f"{verb}: {what} limited", partial(limited, verb, what=what)
        yield f"{verb}: refused by the disk", partial(refused, verb, every=every)
        yield f"{verb}: disk full", partial(full_disk, verb, sizes=DISKS)


def _of_finished(verb: str, tampering: Callable[[Path, Path], Iterator[Tried]], folder: Path) -> Iterator[Tried]:
    VERBS[verb](folder / "whole")
    yield from tampering(folder / "whole", folder / "scratch")


def tried(attempt: Callable[[Path], Iterator[Tried]]) -> list[Tried]:
    with tempfile.TemporaryDirectory(prefix="mixlens-faults-") as folder:
        return list(attempt(Path(folder)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="random kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", nargs="*", default=list(VERBS), choices=list(VERBS))
    parser.add_argument("--every", type=int, default=1, help="of the operations on the disk")
    parser.add_argument("--only", default="", help="lines of the table that contain this")
    options = parser.parse_args()
    failures: list[str] = []
    print("| fault | tried | held | failed |\n|---|---|---|---|")
    for line, attempt in attempts(options.verbs, options.n, every=options.every, seed=options.seed):
        if options.only in line:
            found = tried(attempt)
            failed = [f"{line}, {which}: {wrong}" for which, wrong in found if wrong]
            failures += failed
            print(f"| {line} | {len(found)} | {len(found) - len(failed)} | {len(failed)} |", flush=True)
    print(*failures, sep="\n", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
