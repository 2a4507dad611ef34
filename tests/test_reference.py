"""The reference against cases worked on paper, and against the laws of the algorithm in float64."""

import math

import pytest
import torch
from torch import tensor

from bcl_fast import reference as ref
from bcl_fast.spec import BCLConfig
from bcl_fast.structures import Pull
from bcl_fast.testing import VARIANTS, compete

F64 = torch.float64
NAN, INF = math.nan, math.inf


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)  # eps = 1e-8 of the formulas is left out on paper


# Three features on a ring, each with one neighbor: 0 -> 1, 1 -> 2, 2 -> 0. Two samples.
NEIGHBORS = tensor([[1], [2], [0]])
ACTIVATION = tensor([[3.0, -1.0, 2.0], [0.0, 4.0, -4.0]], dtype=F64)
MARGIN = tensor([[2.0, -1.0, -1.0], [-4.0, 0.0, 4.0]], dtype=F64)
R = tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=F64)  # made up: easy numbers for steps 4 to 9


def test_step_1_neighbors_are_sorted_and_exclude_oneself():
    weight = tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.1]], dtype=F64)
    # Cosines of feature 0: 1 -> .71, 2 -> 0, 3 -> -.995; of 2: 1 -> .71, 3 -> .0995, 0 -> 0.
    neighbors = ref.neighbors(weight, 3)
    assert neighbors[0].tolist() == [1, 2, 3]
    assert neighbors[2].tolist() == [1, 3, 0]
    assert neighbors.dtype == torch.int64


def test_step_1_takes_at_most_all_others_and_the_smaller_index_of_ties():
    similarity = tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    assert ref.nearest(similarity, 8).tolist() == [[1, 2], [0, 2], [0, 1]]


def test_step_1_zero_row_has_cosine_zero_with_everything():
    weight = tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]], dtype=F64)
    assert ref.cosine_similarity(weight)[1].tolist() == [0, 0, 0]
    assert ref.neighbors(weight, 2)[0].tolist() == [1, 2]


def test_step_1_nan_rows_are_the_last_resort_and_nobody_is_its_own_neighbor():
    similarity = torch.full((3, 3), NAN)
    similarity[0, 1] = -1.0
    assert ref.nearest(similarity, 2).tolist() == [[1, 2], [0, 2], [0, 1]]


def test_step_2_strength():
    close(ref.strength(ACTIVATION), tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 4.0]], dtype=F64))


def test_step_3_margin_and_rank_score():
    close(ref.margin(ACTIVATION.abs(), NEIGHBORS), MARGIN)
    close(ref.rank_score(tensor([[0.0, math.log(3) / 5]], dtype=F64), 5.0), tensor([[0.5, 0.75]], dtype=F64))


def test_step_3_margin_is_against_the_strongest_neighbor():
    strength = tensor([[1.0, 5.0, 3.0]])
    assert ref.margin(strength, tensor([[1, 2], [0, 2], [0, 1]])).tolist() == [[-4.0, 2.0, -2.0]]


def test_step_4_image_coverage():
    close(ref.image_coverage(R), tensor([1.0, 1.0], dtype=F64))


def test_step_5_feature_novelty():
    coverage = tensor([1.0, 2.0], dtype=F64)
    # Feature 0: (.5/1 + .25/2) / .75 = 5/6; 1: (.25 + .125) / .5 = 3/4; 2: (.25 + .25) / .75 = 2/3.
    close(ref.feature_novelty(R, coverage), tensor([5 / 6, 3 / 4, 2 / 3], dtype=F64))


def test_step_6_local_novelty():
    # 1 / (1 + R of the one neighbor): row 0 neighbors' R are .25, .25, .5.
    close(ref.local_novelty(R, NEIGHBORS)[0], tensor([0.8, 0.8, 2 / 3], dtype=F64))


def test_step_7_win_rate():
    close(ref.win_rate(R), tensor([0.375, 0.25, 0.375], dtype=F64))


def test_step_8_winner_is_the_argmax_of_the_margin_even_where_the_sigmoid_saturates():
    assert ref.winner(MARGIN).tolist() == [0, 2]
    saturated = tensor([[9.0, 30.0, 20.0]])
    assert ref.rank_score(saturated, 5.0).tolist() == [[1.0, 1.0, 1.0]]
    assert ref.winner(saturated).tolist() == [1]
    assert ref.winner(tensor([[1.0, 2.0, 2.0]])).tolist() == [1]


def test_step_8_mask_holds_the_winners_neighbors_not_the_winner():
    assert ref.winner_mask(tensor([0, 2]), NEIGHBORS).tolist() == [[False, True, False], [True, False, False]]


def test_step_9a_winner_pull_columns_sum_to_one_or_zero():
    mask = tensor([[False, True, False], [False, True, False]])
    local = tensor([[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]], dtype=F64)
    # Column 1: .25 * .5 = .125 and .25 * 1 = .25, that is 1/3 and 2/3.
    pull = ref.winner_pull(R, local, mask)
    close(pull, tensor([[0, 1 / 3, 0], [0, 2 / 3, 0]], dtype=F64))
    close(ref.winner_target(pull, tensor([[3.0], [6.0]], dtype=F64)), tensor([[0.0], [5.0], [0.0]], dtype=F64))


def test_step_9b_key_is_the_cosine_up_to_the_features_norm():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 4, dtype=F64), torch.randn(3, 4, dtype=F64), torch.randn(3, dtype=F64)
    key = ref.cosine_key(x @ weight.T + bias, bias, ref.inverse_norm(x))
    cosine = torch.nn.functional.cosine_similarity(x[:, None], weight[None], dim=2)
    close(ref.affinity(key, ref.inverse_norm(weight), "cosine"), cosine)
    close(ref.affinity(key, ref.inverse_norm(weight), "clamped_cosine"), cosine.clamp(min=0))


def test_step_9b_rank_is_stable_and_treats_signed_zeros_as_equal():
    key = tensor([[0.0, 2.0], [-0.0, 1.0], [-1.0, 2.0], [0.0, 2.0]])
    assert ref.rank(key).T.tolist() == [[1, 2, 0, 3], [1, 0, 2, 3]]
    close(ref.affinity(key.double(), None, "rank").T[0], tensor([1 / 3, 2 / 3, 0, 1], dtype=F64))


def test_step_9b_nan_ranks_last_and_is_chosen_last():
    key = tensor([[NAN], [INF], [1.0]])
    assert ref.rank(key).T.tolist() == [[2, 1, 0]]
    for rule in ("rank", "cosine", "clamped_cosine"):
        score = ref.selection_score(key, torch.ones(1), torch.ones(3), rule)
        assert ref.select(score, 2).tolist() == [[1, 2]], rule
        assert ref.select(score, 3).tolist() == [[1, 2, 0]], rule


def test_step_9b_rank_of_a_single_sample_is_one():
    assert ref.affinity(tensor([[7.0, -7.0]]), None, "rank").tolist() == [[1.0, 1.0]]


def test_step_9b_image_need():
    close(ref.image_need(tensor([0.0, 3.0], dtype=F64)), tensor([1.0, 0.25], dtype=F64))


def test_step_9b_weighted_affinity():
    affinity = tensor([[1.0, 0.5], [0.0, 1.0]])
    assert ref.weighted_affinity(affinity, tensor([0.5, 0.25])).tolist() == [[0.5, 0.25], [0.0, 0.25]]
    assert ref.weighted_affinity(affinity, None) is affinity


def test_step_9b_selection_score_of_ranks_is_not_divided():
    key = tensor([[1.0], [3.0], [2.0]])
    assert ref.selection_score(key, None, tensor([1.0, 0.5, 0.25]), "rank").T.tolist() == [[0.0, 1.0, 0.25]]


def test_step_9b_select_takes_the_largest_the_smaller_index_of_ties_and_all_for_zero():
    score = tensor([[1.0], [5.0], [1.0], [5.0]])
    assert ref.select(score, 3).tolist() == [[1, 3, 0]]
    assert ref.select(score, 0).tolist() == [[1, 3, 0, 2]]
    assert ref.select(score, 9).shape == (1, 4)


def test_step_9b_rescue_pull_hard_and_soft():
    weighted = tensor([[3.0, -1.0], [1.0, -2.0], [0.0, 4.0]], dtype=F64)
    rows = ref.select(weighted, 2)
    assert rows.tolist() == [[0, 1], [2, 0]]
    hard = ref.rescue_pull(rows, ref.rescue_weight(weighted, rows, "hard"), 3)
    close(hard, tensor([[0.5, 0.5], [0.5, 0.0], [0.0, 0.5]], dtype=F64))
    soft = ref.rescue_pull(rows, ref.rescue_weight(weighted, rows, "soft"), 3)
    close(soft, tensor([[0.75, 0.0], [0.25, 0.0], [0.0, 1.0]], dtype=F64))  # negative values count as 0
    x = tensor([[4.0], [8.0], [2.0]], dtype=F64)
    close(ref.rescue_target(hard, x), tensor([[6.0], [3.0]], dtype=F64))


def test_step_10_blend():
    won, rescued = tensor([[1.0], [2.0]]), tensor([[5.0], [6.0]])
    assert ref.som_target(won, rescued, tensor([0.0, 0.25])).tolist() == [[5.0], [5.0]]


def test_step_10_share_and_onset():
    rate, novelty = tensor([0.1, 0.5]), tensor([0.5, 0.2])
    close(ref.winner_share(rate, novelty, "decoupled", 0.0), rate)
    close(ref.winner_share(rate, novelty, "coupled", 0.0), tensor([0.05, 0.1]))
    close(ref.winner_share(rate, novelty, "decoupled", 0.3), tensor([0.1, 1.0]))  # feature 1 needs no rescue


def test_step_10_projections():
    target = tensor([[2.0, 1.0], [2.0, -1.0]])  # mean (2, 0)
    assert ref.project(target, "centered").tolist() == [[0.0, 1.0], [0.0, -1.0]]
    assert ref.project(target, "orthogonal").tolist() == [[0.0, 1.0], [0.0, -1.0]]
    uneven = tensor([[3.0, 3.0], [1.0, -3.0]])  # mean (2, 0)
    assert ref.project(uneven, "centered").tolist() == [[1.0, 3.0], [-1.0, -3.0]]
    assert ref.project(uneven, "orthogonal").tolist() == [[0.0, 3.0], [0.0, -3.0]]
    balanced = tensor([[1.0, 2.0], [-1.0, -2.0]])  # mean 0 changes nothing
    assert ref.project(balanced, "orthogonal").tolist() == balanced.tolist()


def test_step_11_masks():
    novelty, rate = tensor([0.5, 1.0, 0.25]), tensor([0.5, 0.25, 1.0])
    given = R.float(), novelty, rate, tensor([0, 2]), "decoupled"
    mask = [ref.gradient_mask(*given, kind) for kind in ("soft", "winner_take_all", "none")]
    assert mask[0].equal(R.float())
    assert mask[1].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert mask[2].tolist() == [[1.0] * 3] * 2
    coupled = ref.gradient_mask(R.float(), novelty, rate, tensor([0, 2]), "coupled", "soft")
    close(coupled[0], tensor([0.5 * 0.5 * 0.25, 0.25 * 1.0 * 0.25, 0.25 * 0.25 * 0.25]))  # R * novelty * e


def test_step_11_strength_and_onset():
    rate, novelty = tensor([0.1, 0.5]), tensor([0.25, 0.75])
    assert ref.som_strength(rate, novelty, "decoupled", 0.0).tolist() == [0.75, 0.25]
    assert ref.som_strength(rate, novelty, "coupled", 0.0).tolist() == [1.0, 1.0]
    assert ref.som_strength(rate, novelty, "decoupled", 0.3).tolist() == [0.75, 0.0]


def test_step_12_masked_gradients():
    grad, mask = tensor([[1.0, 2.0]]), tensor([[0.5, 0.25]])
    x, weight = tensor([[3.0, 4.0]]), tensor([[1.0, 0.0], [0.0, 2.0]])
    x_gradient, weight_gradient, bias_gradient = ref.masked_gradients(grad, mask, x, weight)
    assert x_gradient.tolist() == [[0.5, 1.0]]
    assert weight_gradient.tolist() == [[1.5, 2.0], [1.5, 2.0]]
    assert bias_gradient.tolist() == [0.5, 0.5]


def test_step_13_pull_moves_the_weight_or_the_offset():
    x, empty = tensor([[1.0, 3.0]]), torch.zeros(1, 0)
    rescue, forces = (tensor([[0], [0]]), torch.ones(2, 1)), (torch.zeros(2), tensor([1.0, 0.5]))
    pull = Pull(x, empty.long(), empty, *rescue, *forces)  # target = x
    weight, offset = torch.zeros(2, 2), torch.ones(2, 2)
    ref.targets_pull_(weight, None, torch.tensor(0.1), pull)
    close(weight, tensor([[0.1, 0.3], [0.05, 0.15]]))
    weight.zero_()
    ref.targets_pull_(weight, offset, torch.tensor(0.1), pull)
    assert weight.count_nonzero() == 0
    close(offset, tensor([[1.0, 1.2], [1.0, 1.1]]))


def test_a_neighbor_that_is_no_feature_counts_as_the_nearest_that_is():
    damaged = tensor([[-5], [2**62], [0]])
    close(ref.features(damaged), tensor([[0], [2], [0]]))
    found = [compete(ref.competition, ACTIVATION, near) for near in (damaged, tensor([[0], [2], [0]]))]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype, huge", [(torch.float32, 1e30), (F64, 1e200)], ids=str)
def test_norms_whose_squares_are_out_of_range(dtype, huge):
    rows = tensor([[3.0, 4.0], [0.0, 0.0], [3.0, INF], [3.0, NAN]], dtype=dtype)
    close(ref.inverse_norm(rows)[:3], tensor([0.2, 1e8, 0.0], dtype=dtype))
    assert ref.inverse_norm(rows)[3].isnan()
    close(ref.inverse_norm(rows[:1] * huge) * huge, tensor([0.2], dtype=dtype))
    close(ref.cosine_similarity(tensor([[3.0, 4.0], [4.0, 3.0]], dtype=dtype) * huge)[0, 1], tensor(0.96, dtype=dtype))
    target = tensor([[3.0, 3.0], [1.0, -3.0]], dtype=dtype)  # mean (2, 0)
    for factor in (huge, 1 / huge):
        close(ref.project(target * factor, "orthogonal") / factor, tensor([[0.0, 3.0], [0.0, -3.0]], dtype=dtype))


# --- Laws ------------------------------------------------------------------------------------------------------------


def problem(B=23, D=11, N=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, N), (D, N), (D,)
    return [torch.randn(*shape, generator=generator, dtype=F64) for shape in shapes]


def run(x, weight, bias, config):
    neighbors = ref.neighbors(weight, config.neighborhood_k)
    return ref.record(0, x, weight, bias, x @ weight.T + bias, neighbors, config)


CONFIGS = {name: BCLConfig(**{"neighborhood_k": 3, **options}) for name, options in VARIANTS.items()}


def test_permuting_samples_changes_no_target():
    for config in CONFIGS.values():
        x, weight, bias = problem()
        order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(1))
        one, other = run(x, weight, bias, config), run(x[order], weight, bias, config)
        close(other.som_target, one.som_target)
        close(other.gradient_mask, one.gradient_mask[order])


def test_permuting_features_permutes_their_targets():
    for config in CONFIGS.values():
        x, weight, bias = problem()
        order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(1))
        one, other = run(x, weight, bias, config), run(x, weight[order], bias[order], config)
        close(other.som_target, one.som_target[order])
        close(other.som_strength, one.som_strength[order])


def test_scaling_one_sample_and_the_others_targets():
    """Affinity sees directions only: with the competition fixed, scaling X and W leaves every choice alone."""
    for config in CONFIGS.values():
        x, weight, bias = problem()
        need = torch.rand(x.shape[0], dtype=F64, generator=torch.Generator().manual_seed(2))

        options = need, config.affinity, "hard", config.rescue_k
        one, other = (
            ref.selection(x @ weight.T, None, ref.inverse_norm(x), ref.inverse_norm(weight), *options)[0]
            for x, weight in ((x, weight), (3 * x, 0.5 * weight))
        )
        assert other.equal(one)
        assert ref.neighbors(weight * torch.linspace(0.5, 2, weight.shape[0], dtype=F64)[:, None], 3).equal(
            ref.neighbors(weight, 3)
        )


def test_duplicate_features_share_their_targets_but_for_themselves_as_neighbors():
    for config in CONFIGS.values():
        x, weight, bias = problem()
        weight[1], bias[1] = weight[0], bias[0]
        record = run(x, weight, bias, config)
        close(record.rescue_target[1], record.rescue_target[0])
        assert record.neighbors[0, 0] == 1 and record.neighbors[1, 0] == 0


def test_identities():
    x, weight, bias = problem()
    record = run(x, weight, bias, BCLConfig(neighborhood_k=3))
    close((record.win_rate * record.novelty).sum(), tensor(1.0, dtype=F64))  # mean effective win = 1 / D
    close(record.rescue_pull.sum(dim=0), torch.ones(11, dtype=F64))
    close(record.image_coverage.mean(), record.win_rate.sum())


def test_float32_follows_float64():
    x, weight, bias = problem()
    exact, rounded = (run(x.to(t), weight.to(t), bias.to(t), BCLConfig()) for t in (F64, torch.float32))
    assert rounded.som_target.dtype == torch.float32
    torch.testing.assert_close(rounded.som_target.double(), exact.som_target, rtol=1e-4, atol=1e-5)
