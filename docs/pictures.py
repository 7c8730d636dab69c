"""Draws the README's pictures from the demo model: python docs/pictures.py"""

from pathlib import Path

import mixlens as ml

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    model = ml.load("demo", verbose=False)
    trace = ml.record(model, ml.demo_documents(), settings=ml.RecordSettings(progress=False))
    share = ml.stats.expert_share(trace, by="domain")
    ml.show.expert_share_grid(share).savefig(IMAGES / "share.png", dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
