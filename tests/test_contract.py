"""`bcl_fast.testing.check_stage`, by which every backend is judged: it passes what is right and notices each break."""

import pytest
import torch
from stages import stage_calls

from bcl_fast import reference as ref
from bcl_fast.measure.implementations import Size
from bcl_fast.structures import Competition, Pull
from bcl_fast.testing import check_stage, octave_needs

CALLS = stage_calls(Size(61, 17, 23), like="reference")
CALLS["targets"] = CALLS["targets_pull_"][3:]
CALLS["in offset"] = (CALLS["targets_pull_"][0], torch.zeros(17, 23), *CALLS["targets_pull_"][2:])
CALLS["soft"] = (*CALLS["selection"][:4], octave_needs(61), "rank", "soft", 5)
STAGE = {"in offset": "targets_pull_", "soft": "selection"}


def double(argument):
    if isinstance(argument, Pull):
        return Pull(*map(double, argument))
    return argument.double() if torch.is_tensor(argument) and argument.is_floating_point() else argument


@pytest.mark.parametrize("call", CALLS)
def test_the_reference_keeps_the_contract(call):
    name = STAGE.get(call, call)
    before = [argument.clone() if torch.is_tensor(argument) else argument for argument in CALLS[call]]
    for arguments in (CALLS[call], [double(argument) for argument in CALLS[call]]):
        check_stage(getattr(ref, name), name, arguments)
    for argument, same in zip(CALLS[call], before, strict=True):
        assert not torch.is_tensor(same) or argument.equal(same)


def change(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def competition(**spoil):
    """A competition with one result put through a function of all."""

    def spoiled(right):
        return right._replace(**{name: function(right) for name, function in spoil.items()})

    return spoiled


def pulls_twice(weight, som_offset, som_lr, pull):
    ref.targets_pull_(weight, som_offset, som_lr, pull)
    ref.targets_pull_(weight, som_offset, som_lr, pull)


def pulls_the_weight(weight, som_offset, som_lr, pull):
    ref.targets_pull_(weight, None, som_lr, pull)


LESS = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
BREAKS = {  # call, how its right result is spoilt (or a function that works in place), and what is said of that
    "a worse neighbor": ("neighbors", lambda near: near.roll(1, 0), "neighbors are less similar by"),
    "a twin": ("neighbors", lambda near: near[:, :1].expand_as(near).contiguous(), "a neighbor is named twice"),
    "itself": ("neighbors", lambda near: change(near, (3, 0), 3), "a feature is its own neighbor"),
    "no feature": ("neighbors", lambda near: change(near, (3, 0), 17), "neighbors are no features"),
    "too few": (
        "neighbors",
        lambda near: near[:, 1:],
        r"neighbors is torch.int64 \[17, 7\], not torch.int64 \[17, 8\]",
    ),
    "int32": ("neighbors", torch.Tensor.int, "neighbors is torch.int32"),
    "another winner": (
        "competition",
        competition(winner=lambda right: change(right.winner, 5, (right.winner[5] + 1) % 17)),
        "competition winner differs in 1 elements",
    ),
    "others' pairs": (
        "competition",
        competition(pair_feature=lambda right: right.pair_feature.roll(1, 0)),
        "competition pair_feature differs in",
    ),
    "pairs' pulls": (
        "competition",
        competition(pair_pull=lambda right: right.pair_pull * 1.0001),
        "competition pair_pull is off by",
    ),
    "swapped": (
        "competition",
        competition(novelty=lambda right: right.win_rate, win_rate=lambda right: right.novelty),
        "competition novelty is off by",
    ),
    "one score": (
        "competition",
        competition(rank_score=lambda right: change(right.rank_score, (60, 16), 0.0)),
        "competition rank_score is off by",
    ),
    "not a number": (
        "competition",
        competition(need=lambda right: change(right.need, 0, torch.nan)),
        "competition need is off by nan",
    ),
    "widened": ("competition", competition(need=lambda right: right.need.double()), "need is torch.float64"),
    "another sample": (
        "selection",
        lambda rows, shares: (change(rows, (2, 4), (rows[2, 4] + 1) % 61), shares),
        "selection rescue_rows differs in",
    ),
    "the same sample twice": (
        "selection",
        lambda rows, shares: (change(rows, (2, 4), rows[2, 3]), shares),
        "selection rescue_rows differs in",
    ),
    "equal shares": ("soft", lambda rows, shares: (rows, torch.full_like(shares, 0.2)), "rescue_weight is off by"),
    "others' shares": ("soft", lambda rows, shares: (rows, shares.flip(1)), "rescue_weight is off by"),
    "targets": ("targets", lambda target: target * 1.0001, "targets is off by"),
    "two pulls": ("targets_pull_", pulls_twice, "targets_pull_ is off by"),
    "no pull": ("targets_pull_", lambda *arguments: None, "targets_pull_ is off by"),
    "the weight": ("in offset", pulls_the_weight, "targets_pull_ changes the weight, not the offset"),
    "a last bit": ("gradient", lambda masked, total: (masked * LESS, total), "gradient masked differs in"),
    "a sample's sum": (
        "gradient",
        lambda masked, total: (masked, total - masked[0]),
        "gradient bias_gradient is off by",
    ),
    "ranks from 1": ("rank", lambda rank: rank + 1, "rank differs in 1037 elements"),
    "norms": ("inverse_norm", lambda inverse: inverse * 1.0001, "inverse_norm is off by"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_break_is_noticed(kind):
    call, spoil, message = BREAKS[kind]
    name = STAGE.get(call, call)

    def wrong(*arguments):
        if name.endswith("_"):
            return spoil(*arguments)
        right = getattr(ref, name)(*arguments)
        return spoil(*right) if isinstance(right, tuple) and not isinstance(right, Competition) else spoil(right)

    with pytest.raises(AssertionError, match=message):
        check_stage(wrong, name, CALLS[call])
