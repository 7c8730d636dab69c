"""The command `again`, which repeats the command that wrote a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cyclopts import CycloptsError
from cyclopts.config import Dict

from mixlens.cli.app import Result, app
from mixlens.cli.options import Output
from mixlens.core.run_dir import META, open_run, written_by
from mixlens.errors import RunError

# Options that name output files: a repetition writes only to its own folder.
_PLACES = ("out", "csv")


@app.command
def again(run: str, /, *, out: str | None = None, output: Output = Output()) -> Result:
    """Repeat the command that wrote a run and report which files are identical.

    Run it from the folder in which the original command was started, because relative paths refer to that folder. The
    repetition reads the inputs of the original command and writes only to its own folder. Repeat only runs whose author
    you trust.

    Parameters
    ----------
    run
        Run directory.
    out
        Run directory of the repetition. By default RUN-again.
    """
    first = open_run(run, check=False)
    command = first.meta.get("command")
    if command is None:
        raise RunError(
            f"Cannot repeat {run}: it does not contain the command that wrote it, because it was written from Python, "
            "or the command contained a key. Run the original code or command again.",
            argument="run",
            value=run,
        )
    folder = out or f"{run.rstrip('/')}-again"
    words = [*_without_places(command["words"]), "--out", folder, *(["--quiet"] if not output.progress else [])]
    options = {name: value for name, value in command["options"].items() if name not in (*_PLACES, "json", "quiet")}
    app.config = (Dict(options, use_commands_as_keys=False),) if options else ()
    try:
        repeated, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise RunError(
            f"Cannot repeat {run}: this version of mixlens does not understand its command: "
            f"{' '.join(str(error).split())} Use the version that wrote it.",
            argument="run",
            value=run,
        ) from error
    with written_by({"words": [word for word in words if word != "--quiet"], "options": options}):
        result = repeated(*bound.args, **bound.kwargs)
    return _beside(result, first.meta, folder) if isinstance(result, Result) else result


def _without_places(words: Sequence[str]) -> list[str]:
    options = tuple(f"--{name}" for name in _PLACES)
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in options:
            kept.append(word)
        skip = word in options
    return kept


def _beside(result: Result, first: Mapping[str, Any], folder: str) -> Result:
    """Add to the result which files of the repetition are byte for byte those of the first run."""
    if not (Path(folder) / META).exists():
        return result
    files, other = first["files"], open_run(folder, check=False).meta["files"]
    same = [name for name, entry in files.items() if other.get(name) == entry]
    differ = sorted((files.keys() | other.keys()) - set(same))
    said = f"{len(same)} of {len(files)} files are the same bytes" + (f"; not {', '.join(differ)}" if differ else "")
    text = None if result.text is None else f"{result.text}\n{said}"
    return replace(result, data={**result.data, "same": same, "differ": differ}, text=text)
