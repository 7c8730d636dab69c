"""Verification of a folder of benchmark data by row counts and known checksums."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mixlens.core.run_dir import sha256_file
from mixlens.errors import BadInput
from mixlens.evals.protocols import tasks_folder


def verify(folder: Path) -> pd.DataFrame:
    """Verify every known file of the benchmarks in `folder`.

    Row counts and checksums are compared with evals/data.json, and with SHA256SUMS beside the files if there is one. A
    benchmark without a folder is skipped.

    Parameters
    ----------
    folder : Path
        Folder with benchmarks in their original formats.

    Returns
    -------
    pandas.DataFrame
        benchmark, file, rows, expected (NaN if unknown), fault ("" if there is none).

    Raises
    ------
    BadInput
        If the folder contains no known benchmark.
    """
    known = json.loads((tasks_folder() / "data.json").read_text("utf-8"))
    here = [name for name in known if (folder / name).is_dir()]
    if not here:
        raise BadInput(
            f"Cannot verify benchmark data in {folder}: it has no folder of a known benchmark. Pass the folder that "
            f"holds one of {', '.join(known)}.",
            argument="data",
            value=str(folder),
        )
    rows = [row for name in here for row in _verified(folder / name, name, known[name])]
    return pd.DataFrame(rows, columns=["benchmark", "file", "rows", "expected", "fault"])


def verified_sums(folder: Path, benchmarks: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the sha256 of the files of these benchmarks, by benchmark and pattern; missing files are skipped.

    For a pattern with several files it is that of the lines that sha256sum prints for them.

    Raises BadInput if files differ from the released ones.
    """
    known = json.loads((tasks_folder() / "data.json").read_text("utf-8"))
    rows = {name: _verified(folder / name, name, known[name]) for name in known if name in benchmarks}
    every = [row for of_benchmark in rows.values() for row in of_benchmark]
    if wrong := [f"{row['file']}: {row['fault']}" for row in every if row["fault"] not in ("", "missing")]:
        raise BadInput(
            f"Cannot use the benchmark data in {folder}: it differs from the released data: {'; '.join(wrong)}. "
            "Download the files again (mixlens data verify DIR lists them), or leave out data= to load from the Hub.",
            argument="data",
            value=wrong,
        )
    return {name: {row["file"]: row["sha256"] for row in found if row.get("sha256")} for name, found in rows.items()}


def _verified(folder: Path, name: str, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per group of files, such as the 57 files of MMLU's test split."""
    sums = _listed_sums(folder)
    rows = []
    for group in groups:
        files = sorted(folder.glob(group["files"]))
        row = {"benchmark": name, "file": f"{name}/{group['files']}", "expected": group["rows"], "rows": 0}
        if not files:
            rows.append(row | {"fault": "" if group.get("optional") else "missing"})
            continue
        faults = []
        try:
            row["rows"] = sum(map(_count, files))
        except (OSError, ValueError, csv.Error) as error:
            faults.append(f"cannot be read ({error})")
        if len(files) != group["count"]:
            faults.append(f"{len(files)} files where there are {group['count']}")
        if not faults and row["rows"] != group["rows"]:
            faults.append(f"{row['rows']:,} rows where there are {group['rows']:,}")
        found = {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}
        if wrong := [Path(name).name for name, digest in found.items() if sums.get(name, digest) != digest]:
            faults.append(f"{', '.join(wrong[:3])} differs from SHA256SUMS")
        row["sha256"] = _sum_of(found)
        if len(files) == 1 and group.get("sha256") not in (None, row["sha256"]):
            faults.append("differs from the file that mixlens was tested with")
        rows.append(row | {"fault": "; ".join(faults)})
    return rows


def _sum_of(found: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in found.items())
    return next(iter(found.values())) if len(found) == 1 else hashlib.sha256(lines.encode()).hexdigest()


def _count(path: Path) -> int:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return sum(1 for row in csv.reader(file) if row)
        if path.suffix == ".json":
            content = json.load(file)
            return len(content) if isinstance(content, list) else 1
        return sum(1 for line in file if line.strip() and json.loads(line) is not None)


def _listed_sums(folder: Path) -> dict[str, str]:
    path = folder / "SHA256SUMS"
    if not path.exists():
        return {}
    pairs = (line.split(maxsplit=1) for line in path.read_text("utf-8").splitlines() if line.strip())
    return {name.strip().lstrip("*").removeprefix("./"): digest for digest, name in pairs}
