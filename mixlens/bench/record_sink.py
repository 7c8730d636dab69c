"""Write records to disk as requests end, so that a killed benchmark loses none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixlens.bench.events import Record
from mixlens.core.run_dir import PLAN, RunWriter
from mixlens.errors import RunError

# Records of an unfinished run; deleted when the run is complete.
PARTIAL = "results.partial.jsonl"


class Kept:
    """Collects records in memory, appends each to a file, and advances the progress bar."""

    def __init__(self, writer: RunWriter | None, total: int, *, show: bool) -> None:
        self.records: list[Record] = []
        self._file = None if writer is None else (writer.path / PARTIAL).open("w", encoding="utf-8")
        self._bar = tqdm(total=total, desc="benchmark", unit="request", disable=not show, file=sys.stderr)

    def keep(self, record: Record) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(record.to_json() + "\n")
            self._file.flush()
        self._bar.update(record.phase == "measured")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()


def bench_writer(path: Path, plan: dict[str, Any]) -> RunWriter:
    """Create the writer of a benchmark's run. Raises RunError if the path holds another or a killed run."""
    killed = (path / PLAN).exists() and (path / PARTIAL).exists()
    writer = RunWriter(path, "bench", plan)
    if killed and not writer.complete:
        n = len((path / PARTIAL).read_bytes().splitlines())
        raise RunError(
            f"Cannot write a benchmark to {path}: it holds a benchmark that was killed after {n} requests, which "
            f"cannot be resumed. Pass another folder; the finished requests are in {PARTIAL}.",
            argument="out",
            value=n,
        )
    return writer
