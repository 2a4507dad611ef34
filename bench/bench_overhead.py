"""What does a step cost where numbers are too few to matter: Python, dispatch and launches?"""

from steps import step_times

from bcl_fast.measure.implementations import Size

SIZES = [Size(8, 8, 8), Size(32, 32, 32)]


def test_overhead(size, measured, roof, device, amount):
    measured(step_times, size, roof, None, device, "overhead", **amount)
