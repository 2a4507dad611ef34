#!/usr/bin/env bash
# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, and the tests of its stages with it.
# Usage: csrc/sanitize.sh [python]; needs g++ with its sanitizer libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r bcl_fast kernels csrc tests pyproject.toml "$copy"
cd "$copy"
rm -f bcl_fast/_cpu.*
# Alignment is left out: vectors are loaded from wherever torch put a row, through memcpy.
g++ -O1 -g -std=c++17 -fPIC -shared -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math \
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
    csrc/cpu/{api,baseline,avx2,avx512,exact}.cpp -o bcl_fast/_cpu.so
export ASAN_OPTIONS=detect_leaks=0 # Python's own
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
for isa in baseline avx2 avx512; do
    echo "+ $isa"
    BCL_FAST_ISA=$isa "$python" -m pytest -q -p no:cacheprovider tests/test_cpu.py tests/test_stages.py -k "cpu" \
        --deselect "tests/test_cpu.py::test_every_instruction_set_chooses_alike"
done
