"""Inputs of stages, and what a backend's results for them are held to."""

import torch

from bcl_fast import reference as ref
from bcl_fast.structures import Pull
from bcl_fast.testing import budget, compete, neighbors_of, relative_error
from helpers.backends import stage


def vectors(seed, *lengths, dtype):
    """Positive vectors, as norms and needs are."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator, dtype=dtype) + 0.05 for n in lengths]


def by_row(rows, shares):
    """The choices with each feature's rows in ascending order: sets, not sequences, are the contract."""
    order = rows.argsort(dim=1)
    return rows.gather(1, order), shares.gather(1, order)


def check_selection(backend, activation, bias, rinv, winv, need, rule, weighting, rescue_k):
    arguments = activation, bias, rinv, winv, need, rule, weighting, rescue_k
    rows, shares = by_row(*stage("selection", backend)(*arguments))
    expected_rows, expected_shares = by_row(*ref.selection(*arguments))
    assert rows.dtype == torch.int64 and shares.dtype == activation.dtype
    assert rows.equal(expected_rows)
    assert relative_error(shares, expected_shares) <= 1e-6


def needs(kind, B):
    falling = 1 / torch.arange(1, B + 1, dtype=torch.float32)
    return {
        "flat": torch.ones(B),
        "falling": falling,  # need = 1 / rank of the column below: every score nearly equal
        "log-uniform": 10 ** (6 * torch.rand(B, generator=torch.Generator().manual_seed(3)) - 6),
        "two values": torch.where(torch.arange(B) % 3 == 0, 0.5, 0.25),
        "with nan": torch.where(torch.arange(B) % 5 == 0, torch.nan, falling),
    }[kind]


def check_competition(backend, activation, neighbors, **options):
    """Choices are the reference's; the rest is within the budget, judged by float64."""
    got = compete(stage("competition", backend), activation, neighbors, **options)
    own = compete(ref.competition, activation, neighbors, **options)
    if torch.is_tensor(options.get("x")):
        options["x"] = options["x"].double()
    truth = compete(ref.competition, activation.double(), neighbors, **options)
    assert got.winner.equal(own.winner) and got.pair_feature.equal(own.pair_feature)
    for name, value, near, right in zip(got._fields, got, own, truth, strict=True):
        assert value.dtype == near.dtype and value.shape == near.shape and value.is_contiguous(), name
        if name != "pair_pull" or own.winner.equal(truth.winner):  # pairs of another winner are other pairs
            assert relative_error(value, right) <= budget(near, right) or name == "winner", name
    # What operators return may not alias; the rest stays within them.
    returned = got.rank_score, got.winner, got.pair_feature, got.pair_pull, got.winner_share, got.som_strength
    storages = [tensor.untyped_storage().data_ptr() for tensor in returned]
    assert len(set(storages)) == len(storages)


def pull_of(B, D, N, k, r, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(B, N, generator=generator, dtype=dtype)
    winner = torch.randint(D, (B,), generator=generator)
    pair_pull = torch.rand(B, min(k, D - 1), generator=generator, dtype=dtype)
    rows = torch.rand(D, B, generator=generator).topk(min(r or B, B), dim=1).indices
    shares = torch.rand(rows.shape, generator=generator, dtype=dtype)
    winner_share, som_strength = torch.rand(2, D, generator=generator, dtype=dtype)
    return Pull(x, neighbors_of(D, k)[winner], pair_pull, rows, shares, winner_share, som_strength)


def doubled(pull):
    return Pull(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in pull))
