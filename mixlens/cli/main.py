"""The command line: every command, and where it begins."""

from __future__ import annotations

import sys

from mixlens.cli import again, bench, decide, evals, experiments, providers, runs
from mixlens.cli.app import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, app, main

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
]

if __name__ == "__main__":
    sys.exit(main())
