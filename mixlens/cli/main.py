"""The command line: mixlens record | importance | contributions | topk | stats | report | bench | info | demo ..."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mixlens.cli import compare as comparing_commands
from mixlens.cli import evals as eval_commands
from mixlens.cli import interventions as intervening_commands
from mixlens.cli import quantization as audit_commands
from mixlens.cli.arguments import numbers, read, reading_arguments, table
from mixlens.cli.bench import add_commands
from mixlens.errors import MixlensError

if TYPE_CHECKING:
    import xarray as xr

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# What `mixlens stats` can compute: the name of a function in mixlens.stats, and what it tells.
STATISTICS = {
    "expert_share": "share of each expert, by layer",
    "load_balance": "spread of the load over experts, by layer",
    "routing_entropy": "entropy of the router, in bits",
    "router_confidence": "how sure the router is of its choice",
    "repetition": "how often consecutive tokens choose the same expert",
    "coactivation": "which experts are chosen together",
    "transitions": "which expert follows which from layer to layer",
    "position_profile": "share by position in the sequence",
    "domain_specialization": "share of a domain's tokens that choose an expert",
    "domain_information": "bits that an expert choice tells of the domain",
    "vocabulary_specialization": "how much a token type keeps to one expert",
    "predictability": "how well a token's identity predicts its expert",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        with contextlib.redirect_stdout(_Visible(sys.stdout)):
            result = arguments.run(arguments)
            if result is not None:
                print(json.dumps(result, indent=1, default=str) if arguments.json else _plain(result))
        sys.stdout.flush()
    except MixlensError as error:
        _say_failure(error, as_json=arguments.json)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _say_failure(error: MixlensError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    print(f"mixlens: {error}", file=_Visible(sys.stderr))


class _Visible(io.TextIOBase):
    """A terminal that nothing printed can steer: of control and direction characters it shows the escapes."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        shown = _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        self._terminal.write(shown)
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixlens", description="See what every expert of a Mixtral model does.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    record = _command(commands, "record", _record, "record routing of a corpus into a run directory")
    reading_arguments(record)
    record.add_argument(
        "--signals",
        default="router_logits,logprob",
        help="comma-separated: router_logits, logprob, top_logprobs, or sites such as moe_out (default: %(default)s)",
    )

    stats = _command(commands, "stats", _stats, "print a statistic of a run, with intervals and n")
    stats.add_argument("path", metavar="RUN", help="run directory")
    stats.add_argument("statistic", choices=list(STATISTICS), metavar="STATISTIC", help=", ".join(STATISTICS))
    stats.add_argument("--by", metavar="COLUMN", help="sequence column, such as domain")
    stats.add_argument("--layers", metavar="L,L,...", help="only these layers")
    stats.add_argument("--csv", metavar="FILE", help="write the table there instead")

    report = _command(commands, "report", _report, "write one HTML file about one run or several")
    report.add_argument("paths", nargs="+", metavar="RUN", help="run directories")
    report.add_argument("--out", default="report.html", help="the file to write (default: %(default)s)")

    info = _command(commands, "info", _info, "say what a run holds, or what is installed")
    info.add_argument("path", nargs="?", metavar="RUN", help="run directory; left out: versions and devices")
    info.add_argument("--verify", action="store_true", help="check every file of the run against its checksum")

    intervening_commands.add_commands(partial(_command, commands))
    comparing_commands.add_commands(partial(_command, commands))
    add_commands(partial(_command, commands))
    audit_commands.add_commands(partial(_command, commands))
    eval_commands.add_commands(partial(_command, commands))

    demo = _command(commands, "demo", _demo, "record and report the bundled model on the bundled samples")
    demo.add_argument("--out", default="out/demo", help="folder for the run and report.html (default: %(default)s)")
    return parser


def _command(commands: Any, name: str, run: Callable[..., Any], what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)
    return parser


def _record(arguments: argparse.Namespace) -> dict[str, Any]:
    from mixlens.recording.corpus import RecordSettings
    from mixlens.recording.record import record

    documents, model, settings = read(arguments, RecordSettings())
    signals = [name for name in arguments.signals.split(",") if name]
    trace = record(model, documents, out=arguments.out, signals=signals, settings=settings)
    return {"run": arguments.out, **trace.meta["counts"], "signals": [*trace.signals, *trace.sites]}


def _stats(arguments: argparse.Namespace) -> Any:
    from mixlens import stats
    from mixlens.trace.trace import Trace

    trace = Trace.open(arguments.path)
    if arguments.layers:
        trace = trace.select(layers=numbers(arguments.layers, "Layers"))
    data: xr.Dataset = getattr(stats, arguments.statistic)(trace, **({"by": arguments.by} if arguments.by else {}))
    return table(data, arguments)


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from mixlens.reports.report import report

    path = report(arguments.paths if len(arguments.paths) > 1 else arguments.paths[0], arguments.out)
    return {"report": str(path)}


def _info(arguments: argparse.Namespace) -> dict[str, Any]:
    from mixlens.core.run_dir import open_run, versions

    if arguments.path is None:
        import torch

        installed = versions("mixlens", "torch", "transformers", "accelerate", "datasets", "safetensors")
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {**installed, "devices": names or ["cpu"]}
    run = open_run(arguments.path)
    if arguments.verify and (faults := run.verify()):
        from mixlens.errors import RunError

        raise RunError(
            f"The run {arguments.path} was to be verified. {len(faults)} of its {len(run.meta['files'])} files are at "
            f"fault: {'; '.join(faults)}. Restore them from a copy, or record again into a new folder.",
            argument="path",
            value=len(faults),
        )
    kept = ("kind", "created", "model", "counts", "signals", "sites", "versions")
    said = {key: run.meta[key] for key in kept if key in run.meta}
    return {**said, "files": len(run.meta["files"]), "verified": bool(arguments.verify)}


def _demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from mixlens.models.demo import DEMO, demo_documents
    from mixlens.models.load import load
    from mixlens.models.provenance import describe
    from mixlens.recording.record import record
    from mixlens.reports.report import report

    folder, model = Path(arguments.out), load(DEMO)
    # Named after the weights: a newer demo model gets a run of its own beside the old one.
    run = folder / f"run-{str(describe(model)['router_sha256'])[:8]}"
    trace = record(model, demo_documents(), out=run)
    path = report(trace, folder / "report.html")
    return {"run": str(run), "report": str(path), **trace.meta["counts"]}


def _plain(result: dict[str, Any]) -> str:
    width = max(len(key) for key in result)
    return "\n".join(f"{key:<{width}}  {_flat(value)}" for key, value in result.items())


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
