"""BCLConfig: every option of SPEC section 3 with its default, checked in one place."""

import dataclasses

import pytest

from bcl_fast.spec import CHOICES, PRESETS, BCLConfig

DEFAULTS = dict(
    som_lr=0.005,
    neighborhood_k=8,
    temperature=5.0,
    recompute_every=50,
    affinity="rank",
    need_weighting=True,
    rescue_weighting="hard",
    rescue_k=5,
    forces="decoupled",
    gradient_mask="soft",
    target_projection="none",
    rescue_onset=0.0,
    pull_onset=0.0,
    som_space="weight",
    check_finite=False,
    sync="global",
)


def test_defaults():
    assert BCLConfig().to_dict() == DEFAULTS


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BCLConfig().som_lr = 1.0


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("som_lr", -1e-9, ValueError),
        ("som_lr", float("nan"), ValueError),
        ("som_lr", float("inf"), ValueError),
        ("som_lr", "0.1", TypeError),
        ("som_lr", True, TypeError),
        ("neighborhood_k", 0, ValueError),
        ("neighborhood_k", 2.0, TypeError),
        ("temperature", 0, ValueError),
        ("recompute_every", 0, ValueError),
        ("rescue_k", -1, ValueError),
        ("rescue_onset", 1.5, ValueError),
        ("pull_onset", -0.1, ValueError),
        ("need_weighting", 1, TypeError),
        ("check_finite", None, TypeError),
        *[(name, "nonsense", ValueError) for name in CHOICES],
    ],
)
def test_bad_value_names_option_value_and_range(name, value, error):
    with pytest.raises(error) as caught:
        BCLConfig(**{name: value})
    message = str(caught.value)
    assert name in message and repr(value) in message
    for allowed in CHOICES.get(name, ()):
        assert repr(allowed) in message


def test_unknown_option_lists_the_known():
    with pytest.raises(TypeError, match="'som_rate'.*som_lr"):
        BCLConfig().replace(som_rate=1)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    config = BCLConfig.preset(name, som_lr=0.25)
    assert BCLConfig.from_dict(config.to_dict()) == config
    assert config.som_lr == 0.25
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]


def test_decoupled_preset_is_the_default():
    assert BCLConfig.preset("decoupled") == BCLConfig()


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="'soft-clamp'.*'decoupled'.*'medium'"):
        BCLConfig.preset("medium")


def test_numbers_are_normalized():
    assert isinstance(BCLConfig(som_lr=1).som_lr, float)
