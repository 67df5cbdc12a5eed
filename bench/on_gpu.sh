#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from a checkout, with no network: the kernels' tests on it, then the times
# of every operator and of whole training steps. bench/on_gpu.sh [--dry] [OUT]; --dry goes through the steps on a CPU.
set -euo pipefail

dry=()
if [ "${1:-}" = --dry ]; then
    dry=(--dry)
    shift
fi
if [ $# -gt 1 ]; then
    echo "usage: bench/on_gpu.sh [--dry] [OUT]" >&2
    exit 2
fi
out=()
if [ $# = 1 ]; then
    mkdir -p "$1"
    out=(--out "$(cd "$1" && pwd)")
fi
cd "$(dirname "$0")/.."

unset TRITON_INTERPRET RVI_FAST_BACKEND
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if command -v nvidia-smi >/dev/null; then nvidia-smi; fi
python3 -m rvi_fast.bench.operators "${dry[@]}" "${out[@]}"

# on a CPU a dry run takes seconds; otherwise what is left of nine minutes
device=(--device cuda --limit $((540 > SECONDS ? 540 - SECONDS : 0)))
[ "${#dry[@]}" = 0 ] || device=()
python3 -m rvi_fast.bench "${dry[@]}" "${device[@]}" "${out[@]}"
