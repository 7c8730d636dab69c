"""Records on disk as they end, so that a benchmark that is killed loses none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixlens.bench.events import Record
from mixlens.core.run_dir import PLAN, RunWriter
from mixlens.errors import RunError

# Every request as it ends, for a run that is killed; gone when the run is complete.
PARTIAL = "results.partial.jsonl"


class Kept:
    """Records as they come: in memory, one line each on disk, one step each of the bar."""

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
    """The writer of a benchmark's run. Raises RunError for another run, or one that was killed."""
    killed = (path / PLAN).exists() and (path / PARTIAL).exists()
    writer = RunWriter(path, "bench", plan)
    if killed and not writer.complete:
        n = len((path / PARTIAL).read_bytes().splitlines())
        raise RunError(
            f"Cannot write a benchmark to {path}: it holds one that was killed after {n} requests, and a benchmark "
            f"cannot resume. Read its requests from {PARTIAL}, and pass another folder.",
            argument="out",
            value=n,
        )
    return writer
