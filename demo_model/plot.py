"""Draw the training log.

python -m demo_model.plot --log demo_model/log.jsonl --out demo_model/training.png
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    log = [json.loads(line) for line in options.log.read_text("utf-8").splitlines()]
    tokens = [line["tokens"] / 1e6 for line in log]
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    loss, validation, balance = figure.subplots(3, sharex=True)
    loss.plot(tokens, [line["loss"] for line in log], color="C0")
    loss.set(ylabel="training loss (nats per token)", ylim=(None, 6))
    rate = loss.twinx()
    rate.plot(tokens, [line["lr_scale"] for line in log], color="0.6", linestyle=":")
    rate.set(ylabel="learning rate / peak", ylim=(0, 1.1))
    for before, after in pairwise(log):
        if before["length"] != after["length"]:
            for axes in (loss, validation, balance):
                axes.axvline(before["tokens"] / 1e6, color="0.8", linewidth=1)
            loss.annotate(f" {after['length']}", (before["tokens"] / 1e6, 5.6), color="0.4")
    seen = [line for line in log if "validation_bits_per_byte" in line]
    points = [line["validation_bits_per_byte"] for line in seen]
    validation.plot([line["tokens"] / 1e6 for line in seen], points, "o-", color="C0")
    validation.set(ylabel="validation bits per byte\n(8 documents a domain)")
    for layer in range(len(log[0]["max_over_mean"])):
        balance.plot(tokens, [line["max_over_mean"][layer] for line in log], label=layer, linewidth=1)
    balance.axhline(1.5, color="0.6", linestyle="--")
    balance.set(ylabel="most used expert / mean", xlabel="million tokens", ylim=(1, 2.5))
    balance.legend(title="layer", ncols=4)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
