"""How fast generate is on this machine with each experts implementation, as ml.benchmark measures it.

    python benchmarks/generating.py --shape mid --out benchmarks/results/generating-mid.json

Prefill and decode apart, with intervals over calls, beside what the device was measured to do. Weights are random.
"""

from __future__ import annotations

import argparse
import json

import torch
from decoding import random_model
from measuring import header, write
from recording import SHAPES

import mixlens as ml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--output", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header(torch=torch)
    bench = ml.benchmark(
        random_model(options.shape),
        concurrency=options.batch,
        requests=options.calls,
        workload=ml.bench.Workload(options.prompt, options.output),
        settings=ml.bench.LocalSettings(experts=options.experts, max_seconds=None),
    )
    print(bench)
    results = {
        "settings": vars(options) | {"parameters": bench.meta["model"]["parameters"]},
        "machine": bench.meta["machine"],
        "remarks": bench.remarks(),
        "roofline": json.loads(bench.roofline().to_json(orient="records")),
        "cold_and_warm": json.loads(bench.cold_and_warm().to_json(orient="records")),
        "peak_memory": json.loads(bench.peak_memory().to_json(orient="records")),
    }
    results["settings"].pop("out")
    write(options.out, "generating", measured_on, results)


if __name__ == "__main__":
    main()
