"""Neighbors (step 1) by tiles: the same lists whatever the tiles, and whichever of a pair comes first."""

import pytest
import torch

from bcl_fast import cpu, portable
from bcl_fast import reference as ref
from bcl_fast.testing import columns

needs_library = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
BACKENDS = [
    pytest.param((cpu, "TILE"), marks=needs_library, id="cpu"),
    pytest.param((portable, "NEAR_TILE"), id="portable"),
]
by_tiles = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def tiled(backend, monkeypatch):
    """The stage with tiles of so many features."""
    module, name = backend

    def neighbors(weight, k, tile):
        monkeypatch.setattr(module, name, tile)
        return module.neighbors(weight, k)

    return neighbors


def axes(D, seed=0, dtype=torch.float32):
    """Rows along one of four axes, or against it: cosines are sums of one product, exact, and nearly all tie."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.nn.functional.one_hot(torch.randint(0, 4, (D,), generator=generator), 4)
    return along.to(dtype) * (torch.randint(0, 2, (D, 1), generator=generator) * 2 - 1)


@by_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("D, k", [(2, 1), (37, 1), (37, 8), (37, 36), (130, 8), (331, 20)])
def test_of_equal_ones_the_smaller_index_comes_first_in_any_tiles(tiled, D, k, dtype):
    weight = axes(D, D, dtype)
    expected = ref.neighbors(weight, k)
    for tile in (1 if D < 50 else 13, 7, 64, 4096):
        assert tiled(weight, k, tile).equal(expected), tile


@by_tiles
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 0.0])
def test_rows_without_a_direction_in_any_tiles(tiled, odd):
    weight = axes(101)
    weight[3::17] = odd
    expected = ref.neighbors(weight, 8)
    for tile in (7, 16, 4096):
        assert tiled(weight, 8, tile).equal(expected), tile


@by_tiles
@pytest.mark.parametrize("D", [67, 1031])
def test_the_most_similar_are_found_in_any_tiles(tiled, D):
    weight = columns("random", D, 19, seed=D)
    unit = torch.nn.functional.normalize(weight.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    best = cosine.topk(8, dim=1).values
    for tile in (100, 512, 4096):
        near = tiled(weight, 8, tile)
        assert (near.sort(dim=1).values.diff(dim=1) > 0).all()
        assert (best - cosine.gather(1, near)).abs().max() <= 1e-6, tile


@by_tiles
def test_lists_longer_than_a_tile(tiled):
    weight = axes(50)
    assert tiled(weight, 40, 8).equal(ref.neighbors(weight, 40))


@pytest.mark.parametrize("C, k", [(1000, 3), (16 * 2 * 3 + 1, 3), (5000, 40), (33, 1)])
def test_the_largest_of_the_largest_groups_are_the_largest(C, k):
    """Ties abound: of equal ones the smaller place is first."""
    values = torch.randint(0, 9, (23, C), generator=torch.Generator().manual_seed(C)).float()
    expected = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert portable._nearest_places(values, k).equal(expected)


@needs_library
def test_tiles_are_the_same_for_any_number_of_threads():
    weight = columns("random", 1100, 33)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu.neighbors(weight, 8))
    finally:
        torch.set_num_threads(before)
    assert found[0].equal(found[1]) and found[0].equal(found[2])
