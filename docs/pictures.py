"""Draws the pictures of README and guide, from the demo model and the committed results: python docs/pictures.py"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import mixlens as ml

IMAGES = Path(__file__).parent / "images"
COVERAGE = Path(__file__).parent.parent / "benchmarks" / "results" / "coverage-of-intervals.json"


def main() -> None:
    model = ml.load("demo", verbose=False)
    trace = ml.record(model, ml.demo_documents(), settings=ml.RecordSettings(progress=False))
    share = ml.stats.expert_share(trace, by="domain")
    ml.show.expert_share_grid(share).savefig(IMAGES / "share.png", dpi=160, facecolor="white")
    coverage()


def coverage() -> None:
    """One dot a statistic, at every number of documents."""
    rows = [row for row in json.loads(COVERAGE.read_text("utf-8"))["coverage"] if row["coverage"] is not None]
    documents = sorted({row["documents"] for row in rows})
    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    ax.axhspan(0.93, 0.97, color="0.9", zorder=0)
    ax.axhline(0.95, color="0.5", linewidth=0.8, zorder=1)
    random = np.random.default_rng(0)
    for side, (clustering, color) in enumerate((("weak", "#0072B2"), ("strong", "#D55E00"))):
        chosen = [row for row in rows if row["clustering"] == clustering]
        at = np.array([documents.index(row["documents"]) for row in chosen])
        x = at + (side - 0.5) * 0.4 + random.uniform(-0.13, 0.13, len(at))
        y, error = (np.array([row[name] for row in chosen]) for name in ("coverage", "error"))
        ax.errorbar(x, y, error, fmt="o", markersize=3, linewidth=0.6, color=color, label=f"{clustering}ly clustered")
    ax.set_xticks(range(len(documents)), documents)
    ax.set(xlabel="documents", ylabel="intervals that hold the truth", ylim=(0.9, 1.002))
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "coverage.png", dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
