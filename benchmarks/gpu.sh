#!/bin/sh
# All that needs a CUDA device, the most important first: benchmarks/gpu.sh [SECONDS] [FOLDER] [PYTHON] [small]
# Each result is written as it comes, so that it can be stopped at any time. With "small" every step runs on a CPU, in
# a tiny shape, to try the script itself.
set -u
budget=${1:-480} out=${2:-benchmarks/results} python=${3:-python3} size=${4:-full}
here=$(dirname "$0")
ends=$(($(date +%s) + budget))
left() { echo $((ends - $(date +%s))); }
# step SHARE SCRIPT...: at most this share of a hundred of what is left, so that one slow step leaves time for others.
step() {
    share=$(($(left) * $1 / 100))
    shift
    [ "$share" -gt 15 ] || { echo "skipped, no time left: $*"; return; }
    timeout "$share" "$python" -u "$@" || echo "stopped or failed: $*"
}
if [ "$size" = small ]; then
    shape=tiny place=cpu four='--shape tiny --layers 2' on='small' short='--prompt 8 --output 5 --pairs 2'
    batches='2 3' prompts='16 32' spread='--prompt 16 --chunk 8 --pairs 1' pairs='--pairs 2'
else
    shape=8x7b place=cuda:0 four='--shape 8x7b --layers 4' on=${CARD:-gpu} short=''
    batches='4 16 64' prompts='2048 8192 32768' spread='--prompt 32768 --chunk 4096 --pairs 1' pairs='--pairs 10'
fi
mkdir -p "$out"
step 60 "$here/decoding.py" --shape "$shape" $short --out "$out/decoding-$on.json"
step 40 -m pytest -p no:cacheprovider -m gpu "$here/../tests/gpu"
step 50 "$here/decoding.py" --shape "$shape" --batch $batches --paths compiled --prefill $prompts $short \
    --out "$out/decoding-batches-$on.json"
step 50 "$here/decoding.py" $four --quantization none nf4 int8wo --paths compiled eager $short \
    --out "$out/decoding-quantized-$on.json"
step 60 "$here/recording.py" --shape "$shape" $pairs --out "$out/recording-$on.json"
step 90 "$here/placing.py" --shape "$shape" --card "$place" $spread --out "$out/placing-$on.json"
