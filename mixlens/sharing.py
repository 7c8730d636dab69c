"""Upload runs to the Hub as data sets with a card; `open("hf://owner/name")` reads them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mixlens.core.hub import FOLDER, SCHEME, fault_of, first_line
from mixlens.core.run_dir import META, Run, open_run
from mixlens.errors import BadInput, RunError, visible
from mixlens.evals.figures import scores
from mixlens.evals.log import LM_EVAL_RESULTS, RESULTS, Log
from mixlens.plot.comparison import pareto
from mixlens.plot.matrices import share_heatmap
from mixlens.plot.style import own_figure
from mixlens.registry import open as open_any
from mixlens.stats.pareto import Pareto
from mixlens.stats.routing import expert_share
from mixlens.trace.trace import Trace

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CARD, _FIGURE, _LM_EVAL = "README.md", "figure.png", "lm_eval"


def push(run: Any, name: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload a run to the Hub as a data set with a card that describes it.

    The card holds a figure, checksums and the settings. Every file is verified first. All files arrive in one commit,
    which replaces an earlier run and card of the repository. An evaluation is accompanied by files in lm-eval's format.
    Log in first: ``hf auth login``.

    Parameters
    ----------
    run : Trace, Log, Bench, other run, str or os.PathLike
        A run on disk, or its folder.
    name : str
        "owner/name" of the repository, which is created if missing.
    private : bool, optional
        Create the repository private. A run is pushed to a public repository only if this is False.
    revision : str, optional
        Branch to push to; main by default.

    Returns
    -------
    str
        Address of the commit, "hf://owner/name@commit", for `open`.

    Raises
    ------
    BadInput
        If the run is in memory, or the repository is public without ``private=False``.
    RunError
        If a file of the run is damaged, or the Hub refuses.

    Examples
    --------
    >>> ml.push("runs/pile", "me/pile-routing")  # doctest: +SKIP
    'hf://me/pile-routing@0f1e...'
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    path = run if isinstance(run, str | os.PathLike) else getattr(run, "path", None)
    if path is None:
        raise BadInput(
            f"Cannot push a {type(run).__name__} in memory: it has no files. Write it to a folder with out=, or with "
            "save() for a trace, and push that.",
            argument="run",
            value=type(run).__name__,
        )
    opened = open_run(path)
    if faults := opened.verify():
        raise RunError(
            f"Cannot push {path}: {len(faults)} of its files are at fault: {'; '.join(faults)}. Restore them "
            "from a copy.",
            argument="run",
            value=len(faults),
        )
    api = HfApi()
    try:
        _make(api, name, private)
        beside = _beside(opened, name)
        held = {f"{FOLDER}/{file.relative_to(opened.path).as_posix()}": file for file in _files(opened)}
        there = api.list_repo_files(name, repo_type="dataset", revision=revision)
        earlier = {place for place in there if place == _FIGURE or place.startswith((f"{FOLDER}/", f"{_LM_EVAL}/"))}
        operations = [
            *(CommitOperationAdd(place, content) for place, content in {**held, **beside}.items()),
            *(CommitOperationDelete(place) for place in sorted(earlier - held.keys() - beside.keys())),
        ]
        made = api.create_commit(
            name, operations, commit_message=f"{opened.kind} by mixlens", repo_type="dataset", revision=revision
        )
    except BadInput:
        raise
    except Exception as error:  # the client raises errors of several libraries
        found, do = fault_of(error) or (first_line(error), "Check the name and the network.")
        raise RunError(f"Cannot push to {name}: {found}. {do}", argument="name", value=name) from error
    return f"{SCHEME}{name}@{made.oid}"


def _make(api: HfApi, name: str, private: bool) -> None:
    """Create the repository if missing. Raises BadInput if it is public but `private` is set."""
    api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
    if private and not api.dataset_info(name).private:
        raise BadInput(
            f"Cannot push to {name} privately: the repository is public. Pass private=False if the run "
            "may be public, or another name.",
            argument="private",
            value=name,
        )


def _files(run: Run) -> Iterator[Any]:
    """Yield every file of a run and of its nested runs."""
    yield run.path / META
    for name in run.meta["files"]:
        if name.endswith(f"/{META}"):
            yield from _files(open_run((run.path / name).parent))
        else:
            yield run.path / name


def _beside(run: Run, name: str) -> dict[str, bytes]:
    """Return the card, a figure, and lm-eval's files of an evaluation, by path in the repository."""
    opened = open_any(run.path)
    figure = _drawn(opened)
    found = {} if figure is None else {_FIGURE: figure}
    if isinstance(opened, Log):
        found |= {f"{_LM_EVAL}/{place}": content for place, content in lm_eval_files(opened).items()}
    return {**found, _CARD: _card(run, name, figure is not None).encode()}


def lm_eval_files(log: Log) -> dict[str, bytes]:
    """Return results and samples of every task in lm-eval's format, by file name."""
    run = open_run(str(log.path))
    results = json.loads(run.file(LM_EVAL_RESULTS).read_text("utf-8"))
    stamp = str(log.meta["created"]).replace(":", "-")
    found = {f"results_{stamp}.json": json.dumps(results, indent=2).encode()}
    for task in log.tasks:
        rows = [_sample(record) for record in log.records if record["task"] == task]
        named = re.sub(r"\W", "_", task)
        found[f"samples_{named}_{stamp}.jsonl"] = "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows
        ).encode()
    return found


def _sample(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record to a line of lm-eval's samples, with every request, its arguments and answers."""
    choices, logprobs = record["choices"], record["logprobs"]
    if choices is None or logprobs is None:
        asked, answers, kept = [[record["prompt"]]], [record["responses"]], [record["response"]]
    else:
        asked = [[record["prompt"], choice] for choice in choices]
        answers = [[[value, None]] for value in logprobs]
        kept = [one[0] for one in answers]
    return {
        "doc_id": record["sample_id"],
        "target": record["target"],
        "arguments": {
            f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(parts)} for i, parts in enumerate(asked)
        },
        "resps": answers,
        "filtered_resps": kept,
        "doc_hash": record["doc_hash"],
        **record["metrics"],
    }


def _drawn(run: Any) -> bytes | None:
    if isinstance(run, Trace):
        return own_figure(share_heatmap(expert_share(run))).png()
    if isinstance(run, Log):
        return own_figure(scores(run)).png()
    if isinstance(run, Pareto):
        return own_figure(pareto(run)).png()
    return None


def _card(run: Run, name: str, figure: bool) -> str:
    """Return the page that the Hub shows: all facts needed to read and reproduce the run."""
    meta = run.meta
    model = meta.get("model", {})
    versions = ", ".join(f"{package} {version}" for package, version in meta.get("versions", {}).items())
    counts = ", ".join(f"{value:,} {what}" for what, value in meta.get("counts", {}).items())
    told = {
        "model": model.get("name"),
        "revision": model.get("revision"),
        "weights": (model.get("audit") or {}).get("label"),
        "created": meta.get("created"),
        "counts": counts,
        "versions": versions,
    }
    rows = "".join(f"| {what} | {_cell(value)} |\n" for what, value in told.items() if value)
    files = "".join(
        f"| {_cell(file)} | {entry['bytes']:,} | `{entry['sha256']}` |\n" for file, entry in meta["files"].items()
    )
    viewer = {"trace": "sequences.parquet", "eval": RESULTS, "bench": RESULTS}.get(run.kind)
    shown = f"configs:\n- config_name: default\n  data_files: {FOLDER}/{viewer}\n" if viewer else ""
    command = (meta.get("command") or {}).get("words")
    repeat = f"\nWritten by mixlens {_cell(' '.join(command))}.\n" if command else ""
    picture = f"![The main figure of the run]({_FIGURE})\n\n" if figure else ""
    return f"""---
tags:
- mixlens
- mixture-of-experts
{shown}---

# {_cell(name)}: {run.kind} of {_cell(model.get("name"))}

A run of mixlens, in the folder `{FOLDER}`. Its files are fetched when they are first used, and compared with their
checksums:

```python
import mixlens as ml

run = ml.open("{SCHEME}{name}")
```
{repeat}
| what | how |
|---|---|
{rows}
{picture}| file | bytes | sha256 |
|---|---|---|
{files}"""


def _cell(value: Any) -> str:
    """Escape a text for a cell of a Markdown table."""
    text = visible(str(value)).replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!" else c for c in text)
