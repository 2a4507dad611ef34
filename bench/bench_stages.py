"""What does each stage of a training step take on every backend, and how near does it come to the roof?

A step runs `neighbors` once in 50 and `rank` never; both have benches of their own at the sizes where they matter.
"""

from stages import stage_times

from bcl_fast.measure.implementations import Size

SIZES = [Size(128, 64, 784), Size(512, 512, 784), Size(1024, 4096, 784), Size(4096, 1024, 784)]


def test_stages(size, measured, roof, device, amount):
    measured(stage_times, size, roof, device=device, **amount)
