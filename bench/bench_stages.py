"""What does each stage of a training step take on every backend?

Run it as `pytest bench/bench_stages.py --save bench/results/stages.json`. A step runs `neighbours` once in 50 and
`rank` never.
"""

import pytest

from bcl_fast import measure

SIZES = [(128, 64, 784), (512, 512, 784), (1024, 4096, 784), (4096, 1024, 784)]


@pytest.mark.parametrize("size", [measure.Size(*size) for size in SIZES], ids=str)
def test_stages(size, benchmark, rows):
    if benchmark.disabled:
        size = measure.Size(16, 8, 12)
    repeats = 21 if size.B * size.D < 1e6 else 3
    found = benchmark.pedantic(measure.stage_times, args=(size, 1 if benchmark.disabled else repeats))
    rows.extend({"question": "stages", **row} for row in found)
