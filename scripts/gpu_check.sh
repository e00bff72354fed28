#!/usr/bin/env bash
# Check and measure lorakit on one CUDA machine without a network, section by section:
#
#   bash scripts/gpu_check.sh tests g1 g3 g5 quantised memory peers
#
# Each section ends within nine minutes, can be repeated, and leaves $OUT/SECTION.json (OUT: the
# folder gpu-results by default). PYTHON is the interpreter with torch, transformers and peft.
# WHEELS is a folder with wheels: of bitsandbytes, where the interpreter lacks it, and of peers (trl,
# datasets…) for `peers`. BENCH_TINY=1 tries the scripts in seconds, on a CPU too.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi
python="${PYTHON:-python3}"
out="${OUT:-gpu-results}"
wheels=()
if [ -n "${WHEELS:-}" ]; then wheels=(--wheels "$WHEELS"); fi
if [ -n "${WHEELS:-}" ] && ! "$python" -c 'import bitsandbytes' 2>/dev/null; then
    echo "== bitsandbytes from $WHEELS"
    own=$(mktemp -d)
    trap 'rm -rf "$own"' EXIT
    "$python" -m venv --system-site-packages "$own" &&
        "$own/bin/python" -m pip install --quiet --no-index --no-deps "$WHEELS"/bitsandbytes-*.whl &&
        python="$own/bin/python"
fi
failed=0
for section in "$@"; do
    echo "== $section"
    "$python" scripts/bench/gpu.py "$section" --out "$out" "${wheels[@]}" || failed=1
done
exit "$failed"
