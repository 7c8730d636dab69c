"""Benchmark repositories for a scripted Hub: the schemas of the real ones, and rows written for this project.

Columns, types, subsets, splits and file names are those of the data sets that lm-eval's task files name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value
from evals_parts import PROBLEMS, write_math
from scripted_hub import Hub

Rows = list[dict[str, Any]]
LANGUAGES = ("de", "es", "fr", "it")
_TEXTS = List(Value("string"))

MMLU = [(f"How many corners has a shape of {n} sides?", [str(n + k) for k in range(4)], 0) for n in range(3, 9)] + [
    ("Which of these is a word for nothing?", ["NA", "None", "Some", "1, 2 or 3"], 1)
]
GSM8K = [
    (f"Ada has {n} boxes of {m} pens. How many pens?", f"{n} x {m} = <<{n}*{m}={n * m}>>{n * m}\n#### {n * m}")
    for n, m in zip(range(2, 13), range(3, 14), strict=True)
]
_ADD = 'def {name}(x: int) -> int:\n    """Add {n} to x.\n    >>> {name}(1)\n    {one}\n    """\n'
_CHECK = "\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate(1) == {one}\n"
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": _ADD.format(name=f"add_{n}", n=n, one=n + 1),
        "canonical_solution": f"    return x + {n}\n",
        "test": _CHECK.format(n=n, one=n + 1),
        "entry_point": f"add_{n}",
    }
    for n in range(3)
]
ARC = [
    ("Which of these is cold?", {"text": ["ice", "fire", "steam", "lava"], "label": ["A", "B", "C", "D"]}, "A"),
    ("Which of these can fly?", {"text": ["a stone", "a wren", "a log"], "label": ["1", "2", "3"]}, "2"),
    ("Which of these is round?", {"text": ["box", "dice", "book", "ball", "tent"], "label": list("ABCDE")}, "D"),
]  # fmt: skip
HELLASWAG = [
    ("Washing up", "A man takes a cup.", "he", ["dries it. [substeps] Then rests.", "eats it.", "sings.", "runs."], 0),
    ("Care", "[header] How to wash hands [title] Use soap.", "", ["Sell it.", "Rub, then  rinse.", "Wait.", "Run."], 1),
    ("Sawing a log", "Two people hold a saw.", "they", ["swim.", "read.", "pull it to and fro.", "sleep."], 2),
]  # fmt: skip


def mbpp_rows(numbers: Iterable[int]) -> Rows:
    """Problems as in mbpp.jsonl, with the line ends that the real ones have."""
    return [
        {
            "task_id": n,
            "text": f"Write a function to multiply a number by {n}.",
            "code": f"def times_{n}(x):\r\n  return x * {n}",
            "test_list": [f"assert times_{n}({x}) == {n * x}" for x in (1, 2, 3)],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for n in numbers
    ]


def sanitized_rows(numbers: Iterable[int]) -> Rows:
    """The same problems as in sanitized-mbpp.json, which has other columns."""
    return [
        {
            "source_file": "Benchmark Questions Verification V2.ipynb",
            "task_id": row["task_id"],
            "prompt": row["text"],
            "code": row["code"].replace("\r", ""),
            "test_imports": ["import math"] if row["task_id"] % 2 else [],
            "test_list": row["test_list"],
        }
        for row in mbpp_rows(numbers)
    ]


def publish(
    hub: Hub, *, mmlu: Sequence[str] = ("anatomy", "virology"), math: Sequence[str] = ("algebra",)
) -> dict[str, str]:
    """Every repository that a protocol reads; the commit of each by its name."""
    in_parquet: dict[str, dict[str, dict[str, bytes]]] = {
        "cais/mmlu": {subject: _mmlu(subject) for subject in mmlu},
        "openai/openai_humaneval": {"openai_humaneval": {"test": parquet(HUMANEVAL)}},
        "google-research-datasets/mbpp": {
            "full": _mbpp(mbpp_rows(_FULL), challenge_test_list=_TEXTS),
            "sanitized": _mbpp(sanitized_rows(_SANITIZED), test_imports=_TEXTS),
        },
        "EleutherAI/hendrycks_math": {subject: _math(subject) for subject in math},
        "allenai/ai2_arc": {name: _arc() for name in ("ARC-Challenge", "ARC-Easy")},
        "Rowan/hellaswag": {"data": _hellaswag()},
    }
    all_splits = ("train", "val", "test")
    in_lines = {
        "alexandrainst/m_arc": dict.fromkeys(all_splits, _m_arc),
        "alexandrainst/m_hellaswag": {"val": _m_hellaswag},
        "alexandrainst/m_mmlu": dict.fromkeys(all_splits, _m_mmlu),
    }
    commits = {name: _commit(hub, name, subsets) for name, subsets in in_parquet.items()}
    commits |= {name: _commit_lines(hub, name, splits) for name, splits in in_lines.items()}
    return {**commits, "openai/gsm8k": commit_gsm8k(hub)}


def commit_gsm8k(hub: Hub, rows: Sequence[tuple[str, str]] = GSM8K) -> str:
    """The last three rows are the test split."""
    made = [{"question": question, "answer": answer} for question, answer in rows]
    splits = {"train": parquet(made[:-3]), "test": parquet(made[-3:])}
    return _commit(hub, "openai/gsm8k", {"main": splits, "socratic": splits})


def write_folder(root: Path, subjects: Sequence[str] = ("anatomy", "virology")) -> Path:
    """The same rows in the formats in which the benchmarks were released."""
    for split, folder in {"dev": "dev", "validation": "val", "test": "test"}.items():
        for subject in subjects:
            path = root / "mmlu" / folder / f"{subject}_{folder}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([q, *c, "ABCD"[a]] for q, c, a in _mmlu_split(split))
    (root / "humaneval").mkdir()
    with gzip.open(root / "humaneval" / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines(HUMANEVAL).decode())
    (root / "gsm8k").mkdir()
    for name, rows in {"train": GSM8K[:-3], "test": GSM8K[-3:]}.items():
        (root / "gsm8k" / f"{name}.jsonl").write_bytes(lines([{"question": q, "answer": a} for q, a in rows]))
    (root / "mbpp").mkdir()
    (root / "mbpp" / "mbpp.jsonl").write_bytes(lines(mbpp_rows(_FULL)))
    (root / "mbpp" / "sanitized-mbpp.json").write_text(json.dumps(sanitized_rows(_SANITIZED)))
    for subset in ("ARC-Challenge", "ARC-Easy"):
        (root / "arc" / subset).mkdir(parents=True)
        for split, name in {"train": "Train", "validation": "Dev", "test": "Test"}.items():
            released = lines(map(_arc_released, _arc_rows(split)))
            (root / "arc" / subset / f"{subset}-{name}.jsonl").write_bytes(released)
    (root / "hellaswag").mkdir()
    for name in ("train", "val"):
        released = [row | {"label": int(row["label"])} for row in _hellaswag_rows(name)]
        (root / "hellaswag" / f"hellaswag_{name}.jsonl").write_bytes(lines(released))
    return write_math(root)


def parquet(rows: Rows, **features: Any) -> bytes:
    """A parquet file as `push_to_hub` writes it; `features` are of columns that are not what their values look like."""
    made = Dataset.from_list(rows)
    if features:
        made = made.cast(Features({name: features.get(name, made.features[name]) for name in rows[0]}))
    buffer = io.BytesIO()
    made.to_parquet(buffer)
    return buffer.getvalue()


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


_FULL, _SANITIZED = (*range(1, 14), 601), (2, 3, 4, 6, 11, 12, 14, 602)


def _commit(hub: Hub, name: str, subsets: Mapping[str, Mapping[str, bytes]]) -> str:
    """A repository of parquet files, SUBSET/SPLIT-00000-of-00001.parquet, listed in its card."""
    files = {
        f"{subset}/{split}-00000-of-00001.parquet": content
        for subset, splits in subsets.items()
        for split, content in splits.items()
    }
    return hub.commit("datasets", name, {"README.md": _card(subsets, "{subset}/{split}-*"), **files})


def _commit_lines(hub: Hub, name: str, splits: Mapping[str, Any]) -> str:
    """A repository of JSON Lines, data/LANGUAGE/SPLIT.jsonl."""
    made = {language: {split: lines(rows(language)) for split, rows in splits.items()} for language in LANGUAGES}
    files = {f"data/{language}/{split}.jsonl": c for language, of in made.items() for split, c in of.items()}
    return hub.commit("datasets", name, {"README.md": _card(made, "data/{subset}/{split}.jsonl"), **files})


def _card(subsets: Mapping[str, Iterable[str]], pattern: str) -> bytes:
    said = ["---", "configs:"]
    for subset, splits in subsets.items():
        said += [f"- config_name: {'default' if subset == 'data' else subset}", "  data_files:"]
        for split in splits:
            said += [f"  - split: {split}", f"    path: {pattern.format(subset=subset, split=split)}"]
    return "\n".join([*said, "---", "", "Rows written for tests.", ""]).encode()


def _mmlu_split(split: str) -> list[tuple[str, list[str], int]]:
    return {"dev": MMLU[:5], "validation": MMLU[:2], "test": MMLU[4:]}[split]


def _mmlu(subject: str) -> dict[str, bytes]:
    def rows(split: str) -> Rows:
        return [{"question": q, "subject": subject, "choices": c, "answer": a} for q, c, a in _mmlu_split(split)]

    letters = ClassLabel(names=["A", "B", "C", "D"])
    return {split: parquet(rows(split), answer=letters) for split in ("test", "validation", "dev")}


def _mbpp(rows: Rows, **features: Any) -> dict[str, bytes]:
    parts = {"train": range(601, 975), "test": range(11, 511), "prompt": range(1, 11)}
    of_part = {name: [row for row in rows if row["task_id"] in part] for name, part in parts.items()}
    return {name: parquet(kept, task_id=Value("int32"), **features) for name, kept in of_part.items()}


def _math(subject: str) -> dict[str, bytes]:
    rows = [{"problem": p, "level": "Level 1", "type": subject, "solution": s} for p, s in PROBLEMS]
    return {"train": parquet(rows), "test": parquet(rows)}


def _arc_rows(split: str) -> Rows:
    rows = ARC * 9 if split == "train" else ARC  # enough for 25 shots
    return [{"id": f"Own_{split}_{n}", "question": q, "choices": c, "answerKey": a} for n, (q, c, a) in enumerate(rows)]


def _arc() -> dict[str, bytes]:
    choices = {"text": _TEXTS, "label": _TEXTS}
    return {split: parquet(_arc_rows(split), choices=choices) for split in ("train", "test", "validation")}


def _arc_released(row: Mapping[str, Any]) -> dict[str, Any]:
    pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    stem = {"stem": row["question"], "choices": [{"text": text, "label": label} for text, label in pairs]}
    return {"id": row["id"], "question": stem, "answerKey": row["answerKey"]}


def _hellaswag_rows(split: str) -> Rows:
    rows = HELLASWAG * 4 if split == "train" else HELLASWAG  # enough for 10 shots
    return [
        {
            "ind": n,
            "activity_label": activity,
            "ctx_a": ctx_a,
            "ctx_b": ctx_b,
            "ctx": f"{ctx_a} {ctx_b}".strip(),
            "endings": endings,
            "source_id": f"own~{n}",
            "split": split,
            "split_type": "indomain",
            "label": str(label),
        }
        for n, (activity, ctx_a, ctx_b, endings, label) in enumerate(rows)
    ]


def _hellaswag() -> dict[str, bytes]:
    hidden = [row | {"label": ""} for row in _hellaswag_rows("test")]  # its answers are not public
    rows = {"train": _hellaswag_rows("train"), "test": hidden, "validation": _hellaswag_rows("val")}
    return {split: parquet(r, ind=Value("int32")) for split, r in rows.items()}


def _m_arc(language: str) -> Rows:
    rows = []
    for row in _arc_rows("test"):
        texts = [*row["choices"]["text"], None, None][:5]
        options = {f"option_{letter}": text for letter, text in zip("abcde", texts, strict=True)}
        letter = "ABCDE"[row["choices"]["label"].index(row["answerKey"])]
        rows.append({"id": f"{row['id']}/{language}", "answer": letter, "instruction": row["question"], **options})
    return rows


def _m_hellaswag(language: str) -> Rows:
    return [row | {"activity_label": f"{row['activity_label']} ({language})"} for row in _hellaswag_rows("val")]


def _m_mmlu(language: str) -> Rows:
    return [
        {"id": f"anatomy/{n}", "answer": "ABCD"[a], "instruction": f"{q} ({language})"}
        | {f"option_{letter}": choice for letter, choice in zip("abcd", c, strict=True)}
        for n, (q, c, a) in enumerate(MMLU)
    ]
