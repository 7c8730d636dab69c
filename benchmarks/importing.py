"""How long `import mixlens` takes in a fresh process, and whether it imports torch.

python benchmarks/importing.py --out benchmarks/results/importing.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

from measuring import header, write

CHILD = """
from time import perf_counter
start = perf_counter()
import mixlens
seconds = perf_counter() - start
import json, sys
print(json.dumps({"seconds": seconds, "modules": sorted({"torch", "pandas", "numpy"} & sys.modules.keys())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header()
    runs = [fresh_import() for _ in range(options.processes + 1)][1:]  # the first one fills the disk cache
    times = sorted(run["seconds"] for run in runs)
    results = {
        "median_s": round(median(times), 4),
        "fastest_s": round(times[0], 4),
        "slowest_s": round(times[-1], 4),
        "processes": len(times),
        "imports_torch": any("torch" in run["modules"] for run in runs),
        "imports_of_torch_pandas_numpy": runs[0]["modules"],
    }
    print(f"import mixlens: {results['median_s']} s, imports torch: {results['imports_torch']}")
    write(options.out, "importing", measured_on, {"results": results})


def fresh_import() -> dict:
    return json.loads(subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True).stdout)


if __name__ == "__main__":
    main()
