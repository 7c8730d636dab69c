"""Change a finished run in every way: each change is named, by the run's own check or by opening it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.inside import open_run

import mixlens as ml
from mixlens.errors import MixlensError

STRAYS = ("notes.txt", ".hidden", "tokens-99999.parquet", "folder/deep.bin")


def damages(whole: Path, scratch: Path) -> Iterator[tuple[str, str | None]]:
    """(what was done to which file, what is wrong: it was not named), for every file of a run and of those in it."""
    for path in sorted(one for one in whole.rglob("*") if one.is_file()):
        name = path.relative_to(whole).as_posix()
        data = path.read_bytes()
        middle = len(data) // 2
        changed = {
            "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "cut": data[:-1],
            "addition": data + b" ",
            "removal": None,
            "empty": b"",
            "zeros": bytes(len(data)),
        }
        for how, content in changed.items():
            run = _copy(whole, scratch)
            victim = run / name
            victim.unlink() if content is None else victim.write_bytes(content)
            yield f"{how} of {name}", None if _named(run, name) else "not named"


def strays(whole: Path, scratch: Path) -> Iterator[tuple[str, str | None]]:
    for stray in STRAYS:
        run = _copy(whole, scratch)
        (run / stray).parent.mkdir(exist_ok=True)
        (run / stray).write_bytes(b"stray")
        faults = open_run(run).verify()
        yield stray, None if any(stray.startswith(fault.split(" ")[0]) for fault in faults) else "not named"


def edits(whole: Path, scratch: Path) -> Iterator[tuple[str, str | None]]:
    """Every key of a meta.json, and those within, gone, of another type, and absurd."""
    meta = json.loads((whole / "meta.json").read_text("utf-8"))
    places = [(key,) for key in meta]
    places += [(key, name) for key in meta.keys() - {"checksums"} if isinstance(meta[key], dict) for name in meta[key]]
    for place in places:
        for how, value in {"gone": None, "another type": ["x", {}], "absurd": 10**30}.items():
            run = _copy(whole, scratch)
            edited = json.loads(json.dumps(meta))
            inside = edited[place[0]] if len(place) == 2 else edited
            if how == "gone":
                del inside[place[-1]]
            else:
                inside[place[-1]] = value
            (run / "meta.json").write_text(json.dumps(edited), "utf-8")
            yield f"{'.'.join(place)} {how}", _refusal(run, place[-1])


def _refusal(run: Path, key: str) -> str | None:
    try:
        ml.open(run)
    except MixlensError as error:
        return None if key in str(error) else f"refused without its name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def _named(run: Path, name: str) -> bool:
    try:
        faults = open_run(run).verify()
    except MixlensError as error:
        return Path(name).name in str(error) or "holds no" in str(error) or "was stopped" in str(error)
    return any(fault.split(" ")[0] == name or name.startswith(fault.split(" ")[0] + "/") for fault in faults)


def _copy(whole: Path, scratch: Path) -> Any:
    shutil.rmtree(scratch, ignore_errors=True)
    return Path(shutil.copytree(whole, scratch))
