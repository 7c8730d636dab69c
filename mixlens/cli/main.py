"""Entry point of the command line, with every command."""

from __future__ import annotations

from mixlens.cli import again, bench, decide, evals, experiments, providers, runs
from mixlens.cli.app import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, app, guide, main, script

__all__ = [
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "again",
    "app",
    "bench",
    "decide",
    "evals",
    "experiments",
    "main",
    "providers",
    "runs",
    "script",
]

# Guide page for each command, linked from its --help and its errors.
_PAGES = {
    "load": ("audit",),
    "record": ("record",),
    "statistics": ("stats", "contrast", "importance", "contributions", "topk"),
    "quantize": ("impact", "pareto"),
    "evaluate": ("eval", "data"),
    "benchmark": ("bench", "probe", "models", "providers", "cost"),
    "decide": ("decide",),
    "compare": ("compare",),
    "report": ("report",),
    "files": ("info", "again"),
    "tour": ("demo",),
}
app.help_epilogue = f"Guide: {guide('README')}"
app["data"]["verify"].help_epilogue = f"Guide: {guide('evaluate')}"
for _page, _commands in _PAGES.items():
    for _command in _commands:
        app[_command].help_epilogue = f"Guide: {guide(_page)}"

if __name__ == "__main__":
    script()
