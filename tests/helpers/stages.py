"""Inputs of stages, and what a backend's results for them are held to."""

import torch

from bcl_fast.structures import Pull
from bcl_fast.testing import check_stage, neighbors_of
from helpers.backends import stage


def vectors(seed, *lengths, dtype):
    """Positive vectors, as norms and needs are."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator, dtype=dtype) + 0.05 for n in lengths]


def by_row(rows, shares):
    """The choices with each feature's rows in ascending order: sets, not sequences, are the contract."""
    order = rows.argsort(dim=1)
    return rows.gather(1, order), shares.gather(1, order)


def check_selection(backend, *arguments):
    check_stage(stage("selection", backend), "selection", arguments)


def needs(kind, B):
    falling = 1 / torch.arange(1, B + 1, dtype=torch.float32)
    return {
        "flat": torch.ones(B),
        "falling": falling,  # need = 1 / rank of the column below: every score nearly equal
        "log-uniform": 10 ** (6 * torch.rand(B, generator=torch.Generator().manual_seed(3)) - 6),
        "two values": torch.where(torch.arange(B) % 3 == 0, 0.5, 0.25),
        "with nan": torch.where(torch.arange(B) % 5 == 0, torch.nan, falling),
    }[kind]


def check_competition(
    backend, activation, neighbors, temperature=5.0, x=None, forces="decoupled", rescue_onset=0.0, pull_onset=0.0
):
    x = activation.new_ones(activation.shape[0], 1) if x is None else x
    given = activation, neighbors, temperature, x, forces, rescue_onset, pull_onset
    check_stage(stage("competition", backend), "competition", given)


def pull_of(B, D, N, k, r, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(B, N, generator=generator, dtype=dtype)
    winner = torch.randint(D, (B,), generator=generator)
    pair_pull = torch.rand(B, min(k, D - 1), generator=generator, dtype=dtype)
    rows = torch.rand(D, B, generator=generator).topk(min(r or B, B), dim=1).indices
    shares = torch.rand(rows.shape, generator=generator, dtype=dtype)
    winner_share, som_strength = torch.rand(2, D, generator=generator, dtype=dtype)
    return Pull(x, neighbors_of(D, k)[winner], pair_pull, rows, shares, winner_share, som_strength)
