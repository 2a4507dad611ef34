"""What does a neighbor refresh take as features become many: D x D cosines, never all at once?"""

from stages import stage_times

from bcl_fast.measure.implementations import Size

SIZES = [Size(128, 1024, 784), Size(128, 8192, 784)]


def test_neighbors(size, measured, roof, device, amount):
    measured(stage_times, size, roof, ("neighbors",), device, "neighbors", **amount)
