"""How much memory does a training step need beyond weights and batch, for every implementation? (Linux, or CUDA)"""

import sys

import pytest
import torch

from bcl_fast.measure.alone import alone
from bcl_fast.measure.implementations import Size, reasons, serving
from bcl_fast.measure.rows import absent, row

SIZES = [Size(1024, 4096, 784), Size(4096, 1024, 784), Size(2048, 8192, 784)]


def peaks(size, names, device):
    labels = {"threads": torch.get_num_threads(), "device": device}
    rows = [row("memory", name, size, **labels | alone("memory", name, size, **labels)) for name in names]
    beyond = {one["contestant"]: one["peak_mb"] for one in rows}
    for one in rows:
        if one["peak_mb"] is not None:
            one["mb_beyond_linear"] = one["peak_mb"] - beyond["linear"]
            one["one_bd_and_one_dn_mb"] = 4 * (size.B * size.D + size.D * size.N) / 2**20  # of float32
    return rows + absent("memory", size, reasons(device, compiled="measured by the scaling runs"), **labels)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(size, measured, device, quick):
    names = [name for name in serving(device) if name != "compiled"]
    measured(peaks, size, names[:2] if quick else names, device)
