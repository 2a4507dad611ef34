"""How much does a whole BCL training step cost over `nn.Linear`, refresh included, on every backend?

Run it as `pytest bench/bench_step.py --save bench/results/step.json`.
"""

from dataclasses import asdict

import pytest

from bcl_fast import measure

SIZES = [measure.Size(128, 64, 784), measure.Size(512, 512, 784), measure.Size(1024, 4096, 784)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step(size, benchmark, rows):
    if benchmark.disabled:  # a smoke test: the same code on small numbers
        size, amount = measure.Size(16, 8, 12), dict(steps=2, rounds=1)
    else:
        amount = dict(steps=50, rounds=5)
    measure.check_equal(size)
    times = benchmark.pedantic(measure.step_times, args=(size,), kwargs=amount)
    assert [time.contestant for time in times][0] == "linear"
    rows.extend({"question": "step", "weights": "init", **asdict(time)} for time in times)
