"""Readers for benchmark data, from the Hub at a recorded revision or from a local folder in the original formats.

Task files call the functions named after benchmarks (`custom_dataset`), each of which returns the splits of one
subject. `root` is the local folder, None for the Hub, and `revisions` the commits there, by repository. mixlens ships
none of the data.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from mixlens.core.run_dir import sha256_file
from mixlens.errors import BadInput
from mixlens.evals.hub_datasets import HUB, splits_of

Splits = dict[str, datasets.Dataset]
Revisions = Mapping[str, str] | None
# Names of `datasets` for local file formats.
_FORMATS = ("json", "csv", "parquet", "arrow", "text", "pandas", "xml")


def mmlu(subject: str, root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return questions of one subject: question, choices, answer (index), subject. Splits dev, validation, test."""
    if root is None:
        return splits_of("mmlu", subject, revisions)
    files = {"dev": "dev", "validation": "val", "test": "test"}
    return {
        split: _dataset(_mmlu_rows(Path(root) / "mmlu" / folder / f"{subject}_{folder}.csv", subject))
        for split, folder in files.items()
    }


def _mmlu_rows(path: Path, subject: str) -> Iterable[dict[str, Any]]:
    # csv rather than pandas, which would read the answers "None" and "NA" as missing.
    with _open(path) as file:
        for question, *choices, answer in csv.reader(file):
            yield {"question": question, "choices": choices, "answer": "ABCD".index(answer), "subject": subject}


def humaneval(root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return problems: task_id, prompt, entry_point, canonical_solution, test. Split test."""
    if root is None:
        return splits_of("humaneval", "openai_humaneval", revisions)
    return {"test": _dataset(_json_lines(Path(root) / "humaneval" / "HumanEval.jsonl.gz"))}


def gsm8k(root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return problems: question, answer (worked, with the number after ####). Splits train, test."""
    if root is None:
        return splits_of("gsm8k", "main", revisions)
    return {name: _dataset(_json_lines(Path(root) / "gsm8k" / f"{name}.jsonl")) for name in ("train", "test")}


def mbpp(subset: str = "full", root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return problems: task_id, text, code, test_list, test_setup_code. Splits prompt, test (ids 11 to 510).

    The prompt split begins at id 2, because prompts use the examples 2, 3 and 4 (Austin et al. 2021).

    subset  "full", or "sanitized" for the hand-verified problems
    """
    if root is None:
        rows = [dict(row) for split in splits_of("mbpp", subset, revisions).values() for row in split]
    elif subset == "full":
        rows = list(_json_lines(Path(root) / "mbpp" / "mbpp.jsonl"))
    else:
        rows = _sanitized_mbpp(Path(root) / "mbpp")
    rows = sorted((_mbpp_row(row) for row in rows), key=lambda row: row["task_id"])
    return {
        "prompt": _dataset(row for row in rows if 2 <= row["task_id"] <= 10),
        "test": _dataset(row for row in rows if 11 <= row["task_id"] <= 510),
    }


def _sanitized_mbpp(folder: Path) -> list[dict[str, Any]]:
    found = sorted(folder.glob("sanitized-mbpp*.json"))
    with _open(found[0] if found else folder / "sanitized-mbpp.json") as file:
        return json.load(file)


def _mbpp_row(row: dict[str, Any]) -> dict[str, Any]:
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    text = row.get("text") or row["prompt"]
    code = row["code"].replace("\r\n", "\n")
    return {
        "task_id": row["task_id"],
        "text": text,
        "code": code,
        "test_list": list(row["test_list"]),
        "test_setup_code": setup,
    }


def math(subject: str, root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return problems of one subject: problem, level, type, solution with a boxed answer. Splits train, test.

    A local folder has math/{train,test}/SUBJECT/*.json, one problem per file, as released by Hendrycks et al. 2021.
    """
    if root is None:
        return splits_of("math", subject, revisions)
    return {name: _dataset(_one_a_file(Path(root) / "math" / name / subject)) for name in ("train", "test")}


def _one_a_file(folder: Path) -> Iterable[dict[str, Any]]:
    files = sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise _missing(folder)
    for path in files:
        with _open(path) as file:
            yield json.load(file)


def arc(subset: str, root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return questions: question, choices {text, label}, answerKey. Splits train, validation, test.

    subset  "ARC-Challenge" or "ARC-Easy"; a local folder has arc/SUBSET/SUBSET-{Train,Dev,Test}.jsonl, as released
    """
    names = {"train": "Train", "validation": "Dev", "test": "Test"}
    if root is None:
        return splits_of("arc", subset, revisions)
    folder = Path(root) / "arc" / subset
    return {
        split: _dataset(map(_arc_row, _json_lines(folder / f"{subset}-{name}.jsonl"))) for split, name in names.items()
    }


def _arc_row(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["question"]["choices"]
    columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    return {
        "id": row["id"], "question": row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"],
    }  # fmt: skip


def hellaswag(root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return contexts: activity_label, ctx_a, ctx_b, endings, label. Splits train, validation.

    A local folder has hellaswag/hellaswag_{train,val}.jsonl, as released.
    """
    if root is None:
        return splits_of("hellaswag", "default", revisions)
    files = {"train": "train", "validation": "val"}
    return {
        split: _dataset(_hellaswag_row(r) for r in _json_lines(Path(root) / "hellaswag" / f"hellaswag_{name}.jsonl"))
        for split, name in files.items()
    }


def _hellaswag_row(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")} | {"label": str(row["label"])}


def translated(hub: str, language: str, root: str | None = None, revisions: Revisions = None, **_: Any) -> Splits:
    """Return one language of a translated benchmark from the Hub, its only source.

    hub  m_arc, m_hellaswag or m_mmlu, passed by lm-eval from the metadata of the task file
    """
    if root is not None:
        raise BadInput(
            f"Cannot read {hub} in {language} from {root}: only the Hub has the translated benchmarks. Leave out data= "
            "for these tasks.",
            argument="data",
            value=language,
        )
    return splits_of(hub, language, revisions)


def source_of(benchmark: str | None, task: Any, sums: Mapping[str, str]) -> dict[str, Any]:
    """Describe the source of the documents of an lm-eval task.

    Parameters
    ----------
    benchmark : str or None
        Key of HUB; None for a task that is not from mixlens, or has its own items.
    task : Any
        Task of lm-eval.
    sums : Mapping[str, str]
        sha256, by name, of the local files that the benchmark was read from.

    Returns
    -------
    dict[str, Any]
        from ("mixlens", "folder", "files" or "Hub"), repository, revision (commit on the Hub, None if unknown), and for
        local files sha256 by name.
    """
    found = {"repository": benchmark, "revision": None}
    path, given = task.get_config("dataset_path"), task.get_config("dataset_kwargs") or {}
    if benchmark is not None and sums:
        return {"from": "folder", **found, "sha256": dict(sums)}
    if benchmark is not None:
        commits = (task.get_config("metadata") or {}).get("revisions") or {}
        return {"from": "Hub", "repository": HUB[benchmark], "revision": commits.get(HUB[benchmark])}
    if path is None:
        return {"from": "mixlens", **found}
    if path in _FORMATS or Path(path).is_dir():
        return {"from": "files", **found, "sha256": _file_sums(given.get("data_files"))}
    return {"from": "Hub", "repository": path, "revision": _loaded_revision(task.dataset)}


def _loaded_revision(splits: Any) -> str | None:
    """Return the commit that `datasets` read from the Hub, taken from the name of its cache."""
    files = [file["filename"] for split in dict(splits or {}).values() for file in getattr(split, "cache_files", ())]
    found = {part for file in files for part in Path(file).parts if re.fullmatch("[0-9a-f]{40}", part)}
    return found.pop() if len(found) == 1 else None


def _file_sums(data_files: Any) -> dict[str, str]:
    if isinstance(data_files, Mapping):
        return {name: digest for files in data_files.values() for name, digest in _file_sums(files).items()}
    listed = [data_files] if isinstance(data_files, str) else data_files or []
    return {Path(file).name: sha256_file(Path(file)) for file in listed if Path(file).is_file()}


def _dataset(rows: Iterable[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    with _open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def _open(path: Path) -> Any:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    if not path.exists():
        raise _missing(path)
    return opener(path, "rt", encoding="utf-8", newline="")


def _missing(path: Path) -> BadInput:
    return BadInput(
        f"Cannot read benchmark data: {path} does not exist. Pass as data= the folder with the benchmarks in their "
        "original formats (mixlens data verify DIR lists missing files), or leave it out to load from the Hub.",
        argument="data",
        value=str(path),
    )
