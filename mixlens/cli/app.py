"""The application: parsing, running and printing of commands, and their exit statuses."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import inspect
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Yaml

from mixlens.core.files import REASONS
from mixlens.core.run_dir import written_by
from mixlens.errors import BadInput, MixlensError, RunError, visible

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def _version() -> str:
    from mixlens import __version__

    return f"mixlens {__version__}"


app = App(
    "mixlens",
    help="See what every expert of a Mixtral model does.",
    version=_version,
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(help="Install completion for bash, zsh or fish.")


def guide(page: str) -> str:
    """Return the address of a page of the guide, in the installed package or beside the sources."""
    package = Path(__file__).parent.parent
    installed = package / "_docs"
    return (installed if installed.exists() else package.parent / "docs").joinpath(f"{page}.md").absolute().as_uri()


@dataclass(frozen=True)
class Result:
    """Result of a command: `data` for --json and `text` for people; without text the data is listed.

    status  exit status: EXIT_FAILED if a requirement of the user is not met
    """

    data: dict[str, Any]
    text: str | None = None
    status: int = EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        with _prints_of_others_on_stderr():
            app.config = _configured(argv)
            command, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
        as_json = getattr(bound.arguments.get("output"), "json", False)  # --help and --version have no such option
    except BadInput as error:
        return _fail(error, EXIT_USAGE, argv, as_json=as_json)
    except CycloptsError as error:
        return _fail(BadInput(_usage(error, argv), argument=_named(error)), EXIT_USAGE, argv, as_json=as_json)
    try:
        with contextlib.redirect_stdout(_Visible(sys.stdout)), _remarks():
            with written_by(_repeatable(argv)), _prints_of_others_on_stderr() if as_json else contextlib.nullcontext():
                result = command(*bound.args, **bound.kwargs)
            if isinstance(result, Result) and _leads():
                print(_json(result.data) if as_json else result.text or _listed(result.data))
        sys.stdout.flush()
        return result.status if isinstance(result, Result) else EXIT_DONE
    except MixlensError as error:
        status = EXIT_USAGE if isinstance(error, BadInput) else EXIT_FAILED
        return _fail(error, status, argv, as_json=as_json, message=_by_option(str(error), command))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (BrokenPipeError, _ReaderLeftError):  # the reader (head, a pager) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError) as error:  # wherever it came, as where a module is imported
        reason = REASONS.get(errno.ENOMEM if isinstance(error, MemoryError) else error.errno or 0)
        if reason is None:
            raise
        place = f" with {error.filename}" if isinstance(error, OSError) and error.filename else ""
        told = (
            f"Cannot go on{place}: {reason}. What was complete is kept; make room or raise the limit, and run it again."
        )
        return _fail(RunError(told), EXIT_FAILED, argv, as_json=as_json)
    return EXIT_DONE


def script() -> NoReturn:
    """Run the command `mixlens`; text that libraries print while Python exits goes to standard error."""
    status = main()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.exit(status)


def _configured(argv: Sequence[str]) -> tuple[Yaml, ...]:
    """Return the options in the file of --config; options on the command line take precedence.

    Raises BadInput if the file cannot be read.
    """
    named = [after for word, after in zip(argv, [*argv[1:], ""], strict=True) if word == "--config"]
    named += [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if not named:
        return ()
    file = Yaml(named[-1], must_exist=True, use_commands_as_keys=False)
    try:
        if isinstance(file.config, dict):
            return (file,)
        why = "it contains no options"
    except Exception as error:  # from the YAML library, through cyclopts, or from reading the file
        why = " ".join(str(error).split())
    raise BadInput(
        f"Cannot read the options in {named[-1]}: {why}. Write one option per line, as in max-length: 512.",
        argument="--config",
        value=named[-1],
    )


def _repeatable(argv: Sequence[str]) -> dict[str, Any] | None:
    """Return the command as stored in a run: its words and the options of its file; None if it may contain a secret."""
    from mixlens.endpoints.keys import secret_fields

    words = [word for word in argv if word not in ("--json", "--quiet")]
    if "--config" in words:
        at = words.index("--config")
        words[at : at + 2] = []
    words = [word for word in words if not word.startswith("--config=")]
    options = dict(app.config[0].config) if app.config else {}
    named = [dict(part.split("=", 1) for part in word.split(",") if "=" in part) for word in words]
    secret = list(secret_fields([words, named, options])) or any(re.search(r"://[^/\s]*@", word) for word in words)
    return None if secret else {"words": words, "options": options}


def _usage(error: CycloptsError, argv: Sequence[str]) -> str:
    """Return the message of a parsing error on one line, with a pointer to the help."""
    names = argv[:1] if _is_command(argv) else []
    return f"{' '.join(str(error).split())} See {' '.join(['mixlens', *names, '--help'])}."


def _by_option(text: str, command: Callable[..., Any]) -> str:
    """Replace the Python arguments in a message by the corresponding options of the command."""
    for name in _options(command):
        option = f"--{name.replace('_', '-')}"
        text = re.sub(rf"(?<![\w.\-]){name}=(?=[\s.,;:)]|$)", option, text)
        text = re.sub(rf"(?<![\w.\-]){name}=(?=\S)", f"{option} ", text)
        if "_" in name:
            text = re.sub(rf"(?<![\w.\-]){name}(?![\w(])", option, text)
    return text


def _options(command: Callable[..., Any]) -> list[str]:
    names = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            names += list(getattr(parameter.default, "__dataclass_fields__", (parameter.name,)))
    return sorted(set(names), key=len, reverse=True)


def _named(error: CycloptsError) -> str | None:
    """Return the option or operand that caused a parsing error."""
    if (argument := getattr(error, "argument", None)) is not None:
        return argument.name
    token = getattr(error, "token", None)
    return next(iter(getattr(error, "unused_tokens", ())), None) if token is None else token.keyword or token.value


def _fail(error: MixlensError, status: int, argv: Sequence[str], *, as_json: bool, message: str | None = None) -> int:
    """Print an error with the address of the guide page for its command; return the exit status."""
    message = str(error) if message is None else message
    page = (app[argv[0]] if _is_command(argv) else app).help_epilogue
    if as_json and _leads():
        told = {"error": type(error).__name__, "argument": error.argument, "message": message, "guide": page}
        print(json.dumps(told))
    print("\n".join(filter(None, (f"mixlens: {message}", page))), file=_Visible(sys.stderr))
    return status


def _is_command(argv: Sequence[str]) -> bool:
    return bool(argv) and not argv[0].startswith("-") and argv[0] in app


@contextlib.contextmanager
def _prints_of_others_on_stderr() -> Iterator[None]:
    """Redirect to standard error what libraries print, whether from Python, from C or from buffers."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stdout may not be a real file
            if sys.__stdout__ is not None and sys.__stdout__.fileno() == 1:
                kept = os.dup(1)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, 1)
                os.dup2(2, 1)
                stack.callback(_flush_below)
        yield


def _flush_below() -> None:
    """Flush the buffers of C and of the original standard output, to which a library may have kept a reference."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.__stdout__.flush()  # type: ignore[union-attr]


def _leads() -> bool:
    """Check whether this process prints: the only one, or rank 0 of its launcher, as all ranks have the same result."""
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1 or os.environ.get("RANK", "0") == "0"


def _json(data: dict[str, Any]) -> str:
    """Return standard JSON, in which NaN and infinity are null."""
    return json.dumps(_finite(data), indent=1, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _remarks() -> Iterator[None]:
    """Print a UserWarning as a sentence, without the source line that issued it."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"mixlens: {message}", file=_Visible(sys.stderr))
        else:
            shown(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class _ReaderLeftError(Exception):
    """A broken pipe, under another name because the help printer exits the process on BrokenPipeError."""


class _Visible(io.TextIOBase):
    """A stream that escapes control and direction characters, so that printed text cannot control the terminal."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        encoding = getattr(self._terminal, "encoding", None) or "utf-8"
        try:
            self._terminal.write(visible(text).encode(encoding, "backslashreplace").decode(encoding))
        except BrokenPipeError as error:
            raise _ReaderLeftError from error
        return len(text)

    def flush(self) -> None:
        try:
            self._terminal.flush()
        except BrokenPipeError as error:
            raise _ReaderLeftError from error


def _listed(data: dict[str, Any]) -> str:
    width = max(len(key) for key in data)
    return "\n".join(f"{key:<{width}}  {_flat(value)}" for key, value in data.items())


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
