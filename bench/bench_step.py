"""How much does a whole BCL training step cost over `nn.Linear`, refresh included, on every backend?

Run it as `pytest bench/bench_step.py --save bench/results/step.json`; `--threads 2` for two threads.
"""

from dataclasses import asdict

import pytest

from bcl_fast import measure

SIZES = [(128, 64, 784), (512, 512, 784), (1024, 4096, 784), (4096, 1024, 784), (2048, 8192, 784)]
TRAINED = SIZES[:4]  # at the last size training alone takes minutes


@pytest.mark.parametrize(
    "size, weights",
    [*((measure.Size(*size), "init") for size in SIZES), *((measure.Size(*size), "trained") for size in TRAINED)],
    ids=str,
)
def test_step(size, weights, benchmark, rows):
    if benchmark.disabled:  # a smoke test: the same code on small numbers
        size, amount = measure.Size(16, 8, 12), dict(steps=2, rounds=1, slow_steps=1)
    else:
        small, large = size.B * size.D < 1e6, size.B * size.D > 1e7
        amount = dict(steps=50, rounds=9 if small else 2 if large else 3, slow_steps=20 if small else 2)
    weight = measure.trained_weight(size) if weights == "trained" else None
    if size.B * size.D < 1e6:
        measure.check_equal(size, weight)
    times = benchmark.pedantic(measure.step_times, args=(size, weight), kwargs=amount)
    assert [time.contestant for time in times][0] == "linear"
    rows.extend({"question": "step", **asdict(time)} for time in times)
