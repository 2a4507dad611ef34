"""What kernels do to memory: how much they move, stage by stage against the least there is, and that nothing races.

Counted while they run in Triton's interpreter. A matrix that must be read or written crosses the device's memory once;
what is read again goes through a cache on purpose, is named below, and has a bound of its own.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers.interpreter import Races, Traffic, enable
from test_ahead_of_time import EVERY_CALL, Sizes, arguments, run, stages

pytestmark = pytest.mark.skipif(not enable(), reason="counted in Triton's interpreter, which does not run here")

Elements = Callable[[int, int, int, int, int], float]  # of B, D, N, k, r
SLACK = 1.25


class Row(NamedTuple):
    """Elements of a call: `least` must be moved; the others are bounds on what lanes touch, by argument and kind."""

    least: Elements
    again: dict[tuple[str, str], Elements] = {}  # read more than once through a cache: the first time counts above
    own: dict[tuple[str, str], Elements] = {}  # what the call writes to read it again, in a cache as far as it fits


PULL = Row(
    least=lambda B, D, N, k, r: B * N + D * N + 2 * B * k + 2 * D * r + 2 * D,
    again={
        ("x_ptr", "load"): lambda B, D, N, k, r: (B * k + D * r) * N,  # a gather, from the level-2 cache
        ("pair_feature_ptr", "load"): lambda B, D, N, k, r: 3 * B * k,
    },
    own={  # the pairs grouped by feature: counted in chunks of 16 samples, and read for every 128 inputs
        ("cursor_ptr", "store"): lambda B, D, N, k, r: B * D / 8,
        ("cursor_ptr", "load"): lambda B, D, N, k, r: B * D / 16 + B * k,
        ("cursor_ptr", "atomic"): lambda B, D, N, k, r: 2 * B * k,
        ("start_ptr", "store"): lambda B, D, N, k, r: B * D / 16,
        ("start_ptr", "load"): lambda B, D, N, k, r: 3 * B * D / 16 * (1 + N // 128),
        ("row_ptr", "store"): lambda B, D, N, k, r: B * k,
        ("row_ptr", "load"): lambda B, D, N, k, r: B * k * (1 + N // 128),
        ("pull_ptr", "store"): lambda B, D, N, k, r: B * k,
        ("pull_ptr", "load"): lambda B, D, N, k, r: B * k * (1 + N // 128),
    },
)
NEIGHBORS = Row(
    least=lambda B, D, N, k, r: D * N + D * k,
    # Whole tiles of 16 features with 128, each read for the products of the tile.
    again={("weight_ptr", "load"): lambda B, D, N, k, r: -(-D // 16) * -(-D // 128) * (16 + 128) * N},
)
COMPETITION = Row(
    least=lambda B, D, N, k, r: 2 * B * D + B * N + D * k + 2 * B * k + 4 * B + 4 * D,
    again={("neighbors_ptr", "load"): lambda B, D, N, k, r: B / 8 * D * k + B * k * (k + 1)},
    own={
        ("strength_ptr", "store"): lambda B, D, N, k, r: B * D,
        ("strength_ptr", "load"): lambda B, D, N, k, r: B * D * (k + 1),
        ("rank_score_ptr", "load"): lambda B, D, N, k, r: B * D + B * k * (k + 1),
        ("partial_ptr", "store"): lambda B, D, N, k, r: B / 8 * 2 * D,
        ("partial_ptr", "load"): lambda B, D, N, k, r: B / 8 * 2 * D,
    },
)
STREAM = Row(  # 4 features at a time
    least=lambda B, D, N, k, r: B * D + 2 * B + 2 * D + 2 * D * r,
    again={
        ("x_inverse_norm_ptr", "load"): lambda B, D, N, k, r: B * D / 4,
        ("need_ptr", "load"): lambda B, D, N, k, r: B * D / 4,
        ("bias_ptr", "load"): lambda B, D, N, k, r: B * D / 128,
        ("weight_inverse_norm_ptr", "load"): lambda B, D, N, k, r: B * D / 128,
    },
)
RUNS = {  # the sorted runs of 1024 keys, from which ranks are read: a step of a binary search is a lane
    ("run_ptr", "store"): lambda B, D, N, k, r: -(-B // 1024) * 1024 * D,
    ("run_ptr", "load"): lambda B, D, N, k, r: B * D * (1 + 11 * (-(-B // 1024) - 1)),
}
RANKED = Row(
    least=STREAM.least,
    again={
        ("x_inverse_norm_ptr", "load"): lambda B, D, N, k, r: B * D / 4,
        ("need_ptr", "load"): lambda B, D, N, k, r: 2 * B * D,
    },
    own=RUNS | {("run_ptr", "load"): lambda B, D, N, k, r: 1.8 * B * D},  # few could still be chosen
)
ROWS: dict[tuple[str, str], Row] = {
    ("inverse_norm", "x"): Row(lambda B, D, N, k, r: B * N + B),
    ("neighbors", "all"): NEIGHBORS,
    ("neighbors", "refresh"): NEIGHBORS,
    ("neighbors", "panel"): Row(lambda B, D, N, k, r: 64 * (D + k)),
    ("competition", "decoupled"): COMPETITION,
    ("competition", "coupled"): COMPETITION,
    ("selection", "rank"): RANKED,
    ("selection", "rank-soft"): RANKED,
    ("selection", "clamped"): STREAM,
    ("selection", "cosine-soft"): STREAM,
    ("selection", "rank-bare"): Row(
        STREAM.least, {("x_inverse_norm_ptr", "load"): RANKED.again["x_inverse_norm_ptr", "load"]}, RANKED.own
    ),
    ("selection", "ranks"): Row(lambda B, D, N, k, r: 2 * B * D, {}, RUNS),
    ("targets_pull", "targets"): PULL,
    ("targets_pull", "weight"): PULL._replace(least=lambda *sizes: PULL.least(*sizes) + sizes[1] * sizes[2]),
    ("targets_pull", "offset"): PULL._replace(least=lambda *sizes: PULL.least(*sizes) + 2 * sizes[1] * sizes[2]),
    ("gradient", "mask"): Row(lambda B, D, N, k, r: 3 * B * D + D),
    ("gradient", "winner"): Row(lambda B, D, N, k, r: 2 * B * D + B + D),
    ("gradient", "none"): Row(lambda B, D, N, k, r: 2 * B * D + D),
}
SIZES = {"selection": Sizes(2000, 24, 1)}  # several runs
USUAL = Sizes(200, 120, 72)

calls = pytest.mark.parametrize("stage, call", [(stage, call) for stage, call in EVERY_CALL if stage in stages()])


@calls
def test_moves_what_it_must_once(stage, call):
    sizes, row = SIZES.get(stage, USUAL), ROWS[stage, call]
    torch.manual_seed(0)
    with Traffic() as traffic:
        run(stage, call, arguments(sizes, "cpu"))
    cached, moved = {}, 0
    for place, lanes in traffic.lanes.items():
        key = place.argument, place.kind
        if key in row.own or key in row.again:
            cached[key] = cached.get(key, 0) + lanes
            moved += traffic.distinct[place] if key in row.again else 0
        else:
            moved += lanes
    least = row.least(*sizes[:5])
    print(f"{stage}-{call} moves {moved:,} elements, {moved / least:.2f} of the least\n{traffic}")
    assert least / SLACK <= moved <= SLACK * least
    bounds = row.again | row.own
    assert set(cached) == set(bounds), "the table names what is not there"
    for key, touched in cached.items():
        assert touched <= SLACK * bounds[key](*sizes[:5]), key


@calls
@pytest.mark.parametrize("sizes", [Sizes(100, 70, 30, k=5), Sizes(37, 140, 140, k=3)], ids=lambda sizes: f"{sizes[:3]}")
def test_nothing_races(stage, call, sizes, monkeypatch):
    module = importlib.import_module(f"bcl_fast.kernels.{stage}")
    if hasattr(module, "PROGRAMS"):
        monkeypatch.setattr(module, "PROGRAMS", 2)  # each then takes several tiles
    # The refresh counts its finished programs in refreshed_at: each reads and raises it, the last one writes it.
    with Races(shared={"refreshed_at_ptr"}):
        run(stage, call, arguments(sizes, "cpu"))


def test_every_call_has_a_row():
    assert sorted(ROWS) == sorted(EVERY_CALL)
