#!/bin/sh
# Everything that needs a CUDA device, the most important first: benchmarks/gpu.sh [SECONDS] [FOLDER] [PYTHON]
# Each result is written as it comes, so that it can be stopped at any time.
set -u
budget=${1:-480} out=${2:-benchmarks/results} python=${3:-python3}
here=$(dirname "$0")
ends=$(($(date +%s) + budget))
left() { echo $((ends - $(date +%s))); }
step() {
    [ "$(left)" -gt 30 ] || { echo "skipped, no time left: $*"; return; }
    timeout "$(left)" "$python" -u "$@" || echo "stopped or failed: $*"
}
mkdir -p "$out"
step "$here/decode_steps.py" --layers 32 --only 'all, recording' --budget "$(left)" --out "$out/decode-steps-gpu.json"
step -m pytest -p no:cacheprovider -m gpu "$here/../tests/gpu"
step "$here/decode_steps.py" --layers 4 --budget "$(left)" --out "$out/decode-steps-4-layers-gpu.json"
step "$here/recording.py" --shape 8x7b --pairs 10 --out "$out/recording-8x7b.json"
