"""What watching a training run costs, in training steps: a check of the probe, and the call at every other step.

    python benchmarks/watching.py --out benchmarks/results/watching.json

Measured in turns, on the demo model: a check, with its trace written to a folder, against a training step on as many
tokens as the probe has. A check every n steps then costs ratio / n of the training time. At a step without a check
a watch counts, and does nothing to the model: that call is timed by itself, since a step varies by far more.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch
from measuring import header, interleaved, seconds, write

import mixlens as ml

EVERY = 200  # as Watch has it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="result file; left out: print")
    parser.add_argument("--documents", type=int, default=12, help="of the probe (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=128, help="tokens a document (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="pairs measured (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = ml.load("demo", verbose=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = torch.randint(3, 4000, (arguments.documents, arguments.columns))
    probe = ml.demo_documents()[:: max(1, 60 // arguments.documents)][: arguments.documents]
    settings = ml.RecordSettings(max_length=arguments.columns, overlong="truncate")

    def step() -> None:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        watch = ml.decisions.Watch(model, probe, every=EVERY, out=Path(folder) / "run", settings=settings)
        watch.start()

        def check() -> None:
            watch.start(watch._step + 1)  # a check at the next step, whether it is due or not

        measured_on = header(torch=torch)
        checks = interleaved(step, check, pairs=arguments.pairs)
        watch._step += -watch._step % EVERY  # no check is due within the calls that follow
        counting = [seconds(watch.step) for _ in range(EVERY - 1)]
        results = {
            "probe": {"documents": arguments.documents, "columns": arguments.columns},
            "check_against_training_step": checks,
            "every": EVERY,
            "check_of_training_time": round(checks["ratio"] / EVERY, 5),
            "call_without_a_check_s": round(median(counting), 9),
        }
        watch.close(finished=False)
    write(arguments.out, "watching", measured_on, results)


if __name__ == "__main__":
    main()
