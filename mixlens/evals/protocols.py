"""Protocols, each a task file found by name, and suites, which map benchmarks to protocols."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixlens.errors import BadInput

# Keys of group files in lm-eval that are not keys of a task.
_GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
_TASK = re.compile(r"""^["']?task["']?:[ \t]*["']?([^\s"'\[{#]+)["']?[ \t]*$""", re.MULTILINE)


def tasks_folder() -> Path:
    """Return the folder of task files, in the installed package or beside the sources."""
    package = Path(__file__).parent.parent
    installed = package / "_tasks"
    return installed if installed.exists() else package.parent / "evals"


@dataclass(frozen=True)
class Protocol:
    """Prompts and grading of a benchmark, defined by one task file.

    name       name of the file, such as "mmlu_5shot"
    subjects   selected tasks of a benchmark with several, in the order of the file; None for all
    """

    name: str
    path: Path
    subjects: tuple[str, ...] | None = field(default=None)

    @cached_property
    def config(self) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        return load_yaml(self.path)

    @property
    def about(self) -> dict[str, Any]:
        """Metadata: benchmark, title, primary metric, hub (key of HUB), chat (whether to apply the chat template)."""
        return self.config["metadata"]

    def task_configs(self) -> list[dict[str, Any]]:
        """Return the lm-eval configuration of every task of this protocol, one per subject if it has several."""
        if "group" not in self.config:
            return [dict(self.config)]
        shared = {key: value for key, value in self.config.items() if key not in _GROUP_KEYS}
        members = [m for m in self.config["task"] if self.subjects is None or m["task"] in self.subjects]
        return [
            {**shared, **member, "task": f"{self.name}::{member['task']}", "metadata": dict(self.about)}
            for member in members
        ]


def protocol_names() -> list[str]:
    """Return the names of all protocols with a task file in mixlens."""
    return sorted(path.stem for path in tasks_folder().glob("*.yaml") if not path.stem.startswith("_"))


def suites() -> dict[str, dict[str, str]]:
    """Return the suites by name, each mapping benchmarks to protocols.

    Examples
    --------
    >>> ml.evals.suites()["mixtral-paper"]["mmlu"]
    'mmlu_5shot'
    """
    return json.loads((tasks_folder() / "suites.json").read_text("utf-8"))


def resolve(tasks: Sequence[str], protocol: str | None = None) -> tuple[list[Protocol], list[str]]:
    """Return the protocols named by `tasks`, and the remaining names, which may be tasks of lm-eval.

    tasks     names of benchmarks ("mmlu"), protocols ("mmlu_5shot"), one subject of a protocol ("mmlu_5shot::anatomy"),
              suites ("mixtral-paper": everything in it), tasks of lm-eval, or your own task files ("my.yaml")
    protocol  suite that maps benchmarks to protocols, or the name of a protocol of the benchmark

    Raises BadInput for a benchmark with several protocols if none is chosen, and for an unknown suite.
    """
    chosen: dict[str, Protocol] = {}
    others: list[str] = []
    names, known = protocol_names(), suites()
    if protocol is not None and protocol not in known and protocol not in names:
        raise BadInput(
            f"Cannot find the protocol {protocol!r}: no suite or protocol has this "
            f"name{near(protocol, [*known, *names])}. Pass a suite ({', '.join(known)}) or the name of a task file.",
            argument="protocol",
            value=protocol,
        )
    for task in tasks:
        base, _, subject = task.partition("::")
        if base in known:
            for name in known[base].values():
                _add(chosen, name, None)
        elif base in names:
            _add(chosen, base, subject or None)
        elif members := [name for name in names if _benchmark(name) == base]:
            _add(chosen, _pick(base, members, protocol, known), subject or None)
        else:
            others.append(task)
    return list(chosen.values()), others


def is_task_file(name: str) -> bool:
    """Check whether `name` is a task file in the format of lm-eval."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def check_tasks(tasks: Sequence[str], protocol: str | None = None) -> None:
    """Raise BadInput as `resolve` does, and for a task unknown to mixlens and lm-eval, without importing lm-eval."""
    others = [name for name in resolve(tasks, protocol)[1] if not is_task_file(name)]
    files = lm_eval_task_files() if others else {}
    for name in others:
        # A group or tag of lm-eval occurs as a word in one of its task files.
        word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        if name not in files and not any(word.search(text) for _, text in _lm_eval_texts()):
            raise unknown_task(name, list(files))


def lm_eval_task_files() -> dict[str, str]:
    """Return the files of lm-eval's tasks by name, read as text, without groups and tags."""
    texts = ((path, text) for path, text in _lm_eval_texts() if path.suffix)  # others are only included by these
    return {named[1]: str(path) for path, text in texts if (named := _TASK.search(text))}


@cache
def _lm_eval_texts() -> tuple[tuple[Path, str], ...]:
    package = find_spec("lm_eval")
    paths = () if package is None else Path(str(package.origin)).parent.joinpath("tasks").rglob("*")
    files = [path for path in paths if path.suffix in ("", ".yaml", ".yml") and path.is_file()]
    return tuple((path, path.read_text("utf-8")) for path in files)


def unknown_task(name: str, lm_eval_names: Sequence[str]) -> BadInput:
    """Return the error for an unknown task, with similar names."""
    known = sorted({*protocol_names(), *map(_benchmark, protocol_names()), *suites(), *lm_eval_names})
    return BadInput(
        f"Cannot find the task {name!r}: neither mixlens nor lm-eval has it{near(name, known)}. List the protocols "
        "with mixlens eval --list; tasks of lm-eval have the names that they have there.",
        argument="tasks",
        value=name,
    )


def _add(chosen: dict[str, Protocol], name: str, subject: str | None) -> None:
    path = tasks_folder() / f"{name}.yaml"
    protocol = Protocol(name, path)
    if subject is not None:
        subjects = [member["task"] for member in protocol.config.get("task", []) if isinstance(member, dict)]
        if subject not in subjects:
            raise BadInput(
                f"Cannot find the subject {subject!r} of {name}{near(subject, subjects)}. Pass {name} for all "
                "subjects.",
                argument="subject",
                value=subject,
            )
        before = chosen.get(name)
        wanted = {subject, *((before.subjects or ()) if before else ())}
        if before is not None and before.subjects is None:
            return
        protocol = Protocol(name, path, tuple(s for s in subjects if s in wanted))
    chosen[name] = protocol


def _pick(benchmark: str, members: list[str], protocol: str | None, known: dict[str, dict[str, str]]) -> str:
    if protocol in members:
        return str(protocol)
    if protocol in known and benchmark in known[str(protocol)]:
        return known[str(protocol)][benchmark]
    if protocol is None and len(members) == 1:
        return members[0]
    asked = "none is given" if protocol is None else f"{protocol!r} is not one of them"
    raise BadInput(
        f"Cannot choose a protocol for {benchmark!r}: it has several, and {asked}; scores of different protocols are "
        f"not comparable. Pass one of {', '.join(members)}, or one of {', '.join(known)} as protocol=.",
        argument="protocol",
        value=benchmark,
    )


def _benchmark(name: str) -> str:
    """Return the benchmark of a protocol from its file, read as text because importing lm-eval takes seconds."""
    for line in (tasks_folder() / f"{name}.yaml").read_text("utf-8").splitlines():
        if line.startswith("  benchmark:"):
            return line.split(":", 1)[1].strip()
    return name


def near(name: str, known: Sequence[str]) -> str:
    """Return similar names in brackets; "" if there are none."""
    found = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (near: {', '.join(found)})" if found else ""
