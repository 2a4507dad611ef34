"""Stochastic rounding: right on average, exact where nothing is lost, the same bits for the same seed."""

import pytest
import torch

from bcl_fast.rounding import add_rounded_, stochastic_round

DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_one_of_the_two_neighbors_and_to_the_value_on_average(dtype):
    for value in (1.0, 1.001, -1.001, 3.14159, 1e-3, 700.3, 6e-6, -2e-7, 65000.0):
        many = torch.full((400_000,), value)
        got = stochastic_round(many, dtype, torch.tensor(3)).float()
        ulp = got.unique().diff().max() if got.unique().numel() > 1 else torch.tensor(0.0)
        assert got.unique().numel() <= 2
        assert got.min() <= many[0] <= got.max()
        assert abs(got.double().mean() - many[0].double()) <= 5 * ulp / 2 / 400_000**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_what_is_representable(dtype):
    exact = torch.randn(10_000).to(dtype).float()
    exact[:6] = torch.tensor([0.0, -0.0, 2.0**-24, 1.0, torch.inf, -torch.inf])
    assert stochastic_round(exact, dtype, torch.tensor(1)).float().equal(exact)
    assert stochastic_round(torch.tensor([torch.nan]), dtype, torch.tensor(1)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_depends_on_the_seed_alone_and_leaves_torchs_generator(dtype):
    value, state = torch.randn(1000), torch.get_rng_state()
    one, again, other = (stochastic_round(value, dtype, torch.tensor(seed)) for seed in (5, 5, 6))
    assert one.equal(again) and not one.equal(other)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_increments_are_not_lost(dtype):
    """Each is far below half a unit in the last place: rounding to nearest would lose all of them."""
    weight = torch.ones(2000, dtype=dtype)
    for step in range(100):
        add_rounded_(weight, torch.full((2000,), 1e-4), torch.tensor(step))
    assert abs(weight.float().mean() - 1.01) < 1e-3


def test_full_precision_is_a_plain_sum():
    weight, increment = torch.randn(50), torch.randn(50)
    expected = weight + increment
    add_rounded_(weight, increment, torch.tensor(0))
    assert weight.equal(expected)
