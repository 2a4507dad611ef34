"""What do the ranks of whole columns take, for few long columns and for many short ones?"""

from stages import stage_times

from bcl_fast.measure.implementations import Size

SIZES = [Size(128, 8192, 16), Size(4096, 1024, 16), Size(65_536, 64, 16)]


def test_rank(size, measured, roof, device, amount):
    measured(stage_times, size, roof, ("rank",), device, "rank", **amount)
