"""Write records to disk as requests end, so that a killed benchmark loses none."""

from __future__ import annotations

import sys
import warnings

from tqdm import tqdm

from mixlens.bench.events import Record
from mixlens.core.run_dir import UNFINISHED, RunWriter
from mixlens.errors import visible

PARTIAL = f"{UNFINISHED}/results.jsonl"


class Kept:
    """Collects records in memory, appends each to a file, and advances the progress bar.

    A killed benchmark starts again from the beginning, because its two halves would not be comparable.
    """

    def __init__(self, writer: RunWriter | None, total: int, *, show: bool) -> None:
        self.records: list[Record] = []
        self._file = None
        if writer is not None:
            path = writer.path / PARTIAL
            if path.exists() and (n := len(path.read_bytes().splitlines())):
                warnings.warn(
                    f"The benchmark in {visible(str(writer.path))} was stopped after {n} requests. It is measured "
                    "again from its start.",
                    stacklevel=2,
                )
            self._file = path.open("w", encoding="utf-8")
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
