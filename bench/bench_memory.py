"""How much memory does a BCL training step need beyond what `nn.Linear` needs?

Run it as `pytest bench/bench_memory.py --save bench/results/memory.json` (Linux only).
"""

import sys
from dataclasses import asdict

import pytest
import torch

from bcl_fast import measure, ops

SIZES = [(1024, 4096, 784), (4096, 1024, 784), (2048, 8192, 784)]
CONTESTANTS = [name for name in ("linear", *ops.BACKENDS)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", [measure.Size(*size) for size in SIZES], ids=str)
def test_memory(size, benchmark, rows):
    contestants = [name for name in CONTESTANTS if name in measure.contestants()]
    if benchmark.disabled:
        size, contestants = measure.Size(16, 8, 12), contestants[:2]
    peaks = {name: measure.peak_memory(name, size, torch.get_num_threads()) for name in contestants}
    benchmark.pedantic(lambda: None)  # memory is what is measured
    for name, mb in peaks.items():
        extra = mb - peaks["linear"]
        budget = 4 * (size.B * size.D + size.D * size.N) / 2**20  # one [B, D] and one [D, N] of float32
        row = {"question": "memory", "contestant": name, **asdict(size), "threads": torch.get_num_threads()}
        rows.append({**row, "peak_mb": mb, "mb_beyond_linear": extra, "one_bd_and_one_dn_mb": budget})
