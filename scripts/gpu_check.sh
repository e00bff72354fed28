#!/usr/bin/env bash
# Check and measure lorakit on one CUDA machine without a network, section by section:
#
#   bash scripts/gpu_check.sh tests g1 g3 g5 quantised memory peers
#
# Each section ends within MINUTES (8.5 by default; what they do not reach says so), can be
# repeated, and leaves $OUT/SECTION.json (OUT: the folder gpu-results by default). `memory` goes on
# after the rows that $EARLIER/memory.json has (EARLIER: OUT by default). PYTHON is the interpreter
# with torch, transformers and peft. BENCH_TINY=1 tries the scripts in seconds, on a CPU too. Exits
# 1 when something failed, did not agree, or did not run. In ten minutes of a machine:
#
#   MINUTES=3 bash scripts/gpu_check.sh tests g1 g3
#
# WHEELS is a folder with wheels of what the interpreter lacks, and of peers (trl…) for `peers`.
# Where there is a network, for a machine with Python 3.12 on x86-64 (45 MiB):
#
#   for_it="--only-binary=:all: --python-version 3.12 --implementation cp"
#   for n in 28 27 24 17; do for_it+=" --platform manylinux_2_${n}_x86_64"; done
#   pip download --no-deps $for_it --platform manylinux2014_x86_64 -d wheels \
#       pydantic==2.14.4 pydantic_core==2.50.5 annotated-types typing-inspection \
#       typing-extensions datasets 'dill<0.4.2' 'multiprocess<0.70.20' bitsandbytes
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
    sed -n '2,23s/^# \{0,1\}//p' "$0"
    exit 2
fi
python="${PYTHON:-python3}"
out="${OUT:-gpu-results}"
wheels=()
if [ -n "${WHEELS:-}" ]; then wheels=("$WHEELS"); fi
own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
python=$("$python" scripts/bench/wheels.py "$own" "${wheels[@]}") || exit 1
failed=0
for section in "$@"; do
    echo "== $section"
    "$python" scripts/bench/gpu.py "$section" --out "$out" --earlier "${EARLIER:-$out}" \
        ${MINUTES:+--minutes "$MINUTES"} ${wheels[@]:+--wheels "${wheels[0]}"} || failed=1
done
exit "$failed"
