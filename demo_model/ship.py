"""Put trained weights into the package, with the figures a test recomputes and the checksums of all files.

python -m demo_model.ship --weights out/demo_model/export --evaluation demo_model/evaluation.json
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

SHIPPED = ("model.safetensors", "config.json", "generation_config.json")
FIGURES = ("mean_bits_per_byte", "samples_bits_per_byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder written by save_pretrained")
    parser.add_argument("--package", type=Path, default=Path("mixlens/_demo"))
    parser.add_argument("--evaluation", type=Path, help="what demo_model.evaluate wrote")
    options = parser.parse_args()
    for name in SHIPPED:
        shutil.copyfile(options.weights / name, options.package / name)
    if options.evaluation:
        evaluation = json.loads(options.evaluation.read_text("utf-8"))
        figures = {name: evaluation[name] for name in FIGURES}
        (options.package / "eval.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    sums = options.package / "SHA256SUMS"
    files = sorted(path for path in options.package.iterdir() if path.is_file() and path != sums)
    digests = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    sums.write_text("".join(digests), "utf-8")


if __name__ == "__main__":
    main()
