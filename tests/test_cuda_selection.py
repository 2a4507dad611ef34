"""The CUDA selection (step 9b) by every way through its kernels: settled by bounds, counted, sorted."""

import pytest
import torch
from helpers.backends import stage
from helpers.cuda_cases import check_choices, on_host, over_forms, served
from helpers.stages import by_row, vectors

from bcl_fast import cuda
from bcl_fast import reference as ref
from bcl_fast.testing import columns, relative_error


def opened(monkeypatch, *arguments):
    """The choices of the stage `selection`, how many stripes hold columns to be counted, and how many are sorted."""
    made = []

    def empty(*shape, **kinds):
        made.append(torch.zeros(*shape, **kinds))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        results = stage("selection", "cuda")(*arguments)
    return *results, made[-1].view(torch.int32)[:2].tolist()


@on_host
@pytest.mark.parametrize("weighting", ["hard", "soft"])
@pytest.mark.parametrize(
    "kind, B, path, r",  # a path that some column must take; every r for one kind
    [
        ("random", 40, None, 32),
        ("random", 1500, None, 1),
        ("random", 1500, None, 5),
        ("random", 1500, None, 32),
        ("heavy tails", 1500, "counted", 5),
        ("outliers", 300, "sorted", 5),
        ("quantized", 300, None, 5),
        ("hostile need", 300, "sorted", 5),
        ("nan", 300, "sorted", 5),
    ],
)
def test_selection_by_every_path(monkeypatch, kind, B, path, r, weighting):
    D = 37
    activation = columns("quantized" if kind == "quantized" else "random", B, D)
    rinv, need, bias = vectors(2, B, B, D, dtype=torch.float32)
    need = 1 / (5 + 2 * need)  # as if 5 to 7 features claimed each sample
    if kind == "heavy tails":
        activation = activation**5
        monkeypatch.setitem(cuda.LAUNCH, "selection", {"ahead": 8, "bins": 512, "warps": 16, "round": 128})
    if kind == "outliers":  # found by the sample of few rows: all others share one bin
        activation[:: B // 3] *= 1e20
    if kind == "hostile need":
        need[3] = -1.0
    if kind == "nan":
        activation[torch.rand(B, D, generator=torch.Generator().manual_seed(1)) < 0.1] = torch.nan
        activation[:, 5] = torch.nan
    arguments = activation, bias, rinv, None, need, "rank", weighting, r
    rows, shares, (to_count, to_sort) = opened(monkeypatch, *arguments)
    expected_rows, expected_shares = by_row(*ref.selection(*arguments))
    rows, shares = by_row(rows, shares)
    assert rows.equal(expected_rows) and relative_error(shares, expected_shares) <= 1e-6
    assert path is None or {"counted": to_count, "sorted": to_sort}[path] > 0
    assert weighting == "hard" or to_count + to_sort > 0  # shares need ranks


@served
@over_forms("selection")
def test_selection_in_every_form(monkeypatch, form):
    monkeypatch.setitem(cuda.LAUNCH, "selection", dict(reversed(form.items())))  # in any order
    for kind, B, D in (("random", 700, 37), ("quantized", 300, 33), ("equal", 70, 3), ("huge", 1100, 2)):
        rinv, need, bias = vectors(2, B, B, D, dtype=torch.float32)
        for weighting in ("hard", "soft"):
            check_choices(columns(kind, B, D), bias, rinv, None, need, "rank", weighting, 5)
        check_choices(columns(kind, B, D) ** 3, None, rinv, None, None, "rank", "soft", 32)
    check_choices(columns("random", 70001, 2), None, torch.ones(70001), None, None, "rank", "hard", 3)


ODD_NEEDS = {
    "nan": torch.tensor([0.5, torch.nan, 0.25]),
    "negative": torch.tensor([0.5, -0.25, 0.25]),
    "infinite": torch.tensor([0.5, torch.inf, 0.25]),
    "equal": torch.tensor([0.3]),
    "zero": torch.tensor([0.0, -0.0]),
    "denormal": torch.tensor([1e-45, 3e-42, 1e-40]),
    "far apart": torch.tensor([1e-45, 3e38, 1.0, 1.0000001]),
    "falling": 1 / torch.arange(1, 91),
    "rising": torch.linspace(0.5, 0.6, 90),
}


@served
@pytest.mark.parametrize("need", ODD_NEEDS.values(), ids=ODD_NEEDS)
def test_selection_by_any_needs(need):
    B = 1500
    activation = columns("random", B, 33)
    need = need.repeat(-(-B // len(need)))[:B]
    for weighting, r in (("hard", 1), ("hard", 5), ("soft", 5), ("hard", 32)):
        check_choices(activation, None, torch.ones(B), None, need, "rank", weighting, r)


@served
def test_no_need_of_a_bin_is_taken_for_the_largest():
    """A small need first in its bin must not end the visits: a larger one may follow."""
    B = 200
    activation = torch.linspace(-1, 1, B)[:, None].repeat(1, 3)
    activation[3], activation[40] = 3.0, 2.0
    need = torch.full((B,), 1e-30)  # far below: a bin goes from 0.99 to 0.87
    need[:16], need[16:40], need[40] = 0.9, 0.88, 0.99
    for r in (1, 2):
        check_choices(activation, None, torch.ones(B), None, need, "rank", "hard", r)
    assert stage("selection", "cuda")(activation, None, torch.ones(B), None, need, "rank", "hard", 1)[0].unique() == 40


@served
@pytest.mark.parametrize("B", [65535, 65536, 131072])
def test_counts_of_keys_in_16_bits_do_not_overflow(B):
    """All of a column in one bin; more than 16 bits count, above others that would seem better; NaN."""
    place, activation = torch.arange(B), torch.full((B, 4), 0.3)
    activation[:, 1] = torch.where(place < 30000, place / 30000 - 2, 0.3)
    activation[29990:30000, 1] = -0.5
    activation[::7, 2] = torch.nan
    activation[:, 3] = columns("random", B, 1)[:, 0]
    activation[B - 1, 3] = torch.nan
    need = torch.where(place < 30000, 0.9, 0.4)
    check_choices(activation, None, torch.ones(B), None, need, "rank", "hard", 5)
    if B == 65535:  # the largest counts that 16 bits hold
        check_choices(activation, None, torch.ones(B), None, None, "rank", "soft", 5)


@on_host
def test_selection_is_settled_by_bounds_alone_where_they_decide(monkeypatch):
    """On a batch whose needs differ, most columns need no rank."""
    B, D = 2000, 64
    activation = columns("random", B, D)
    need = 1 / (1 + 20 * torch.rand(B, generator=torch.Generator().manual_seed(0)))
    rows, _, (stripes, to_sort) = opened(monkeypatch, activation, None, torch.ones(B), None, need, "rank", "hard", 5)
    settled = [bool((chosen.diff() > 0).all()) for chosen in rows]  # in the order of the batch: no rank was needed
    assert to_sort == 0 and stripes <= D // 32 and sum(settled) > D * 2 / 3
