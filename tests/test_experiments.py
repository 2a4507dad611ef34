"""The experiments: data and its order, one condition -> one record, a control that is really plain, files on disk."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from bcl_fast import diagnostics, losses
from bcl_fast.experiments.data import Images, batches, digits, load, mnist, split
from bcl_fast.experiments.model import Autoencoder
from bcl_fast.experiments.run import Condition, Training, advance, row_steps, trained
from bcl_fast.records import write_record
from bcl_fast.spec import BCLConfig


@pytest.fixture(scope="module")
def images():
    pytest.importorskip("sklearn")
    return digits()


def condition(**changes):
    return Condition(**{"data": "digits", "config": BCLConfig(som_lr=0.01), "steps": 12, "batch_size": 32, **changes})


def record(condition, images, rows=(0, 5, 11)):
    return trained(condition, images, rows).record()


# --- Data ------------------------------------------------------------------------------------------------------------


def test_digits_are_images_in_0_1_split_at_85_percent(images):
    assert images.train.shape == (1527, 64) and images.held_out.shape == (270, 64) and images.shape == (8, 8)
    assert images.train.dtype == torch.float32 and images.train.min() == 0 and images.train.max() == 1


def test_split_takes_the_first_images_to_train_on():
    pixels = torch.arange(100.0).reshape(20, 1, 5)
    assert split("digits", pixels).train.equal(pixels.flatten(1)[:17])
    assert split("digits", pixels).held_out.equal(pixels.flatten(1)[17:])


def test_batches_shuffle_every_epoch_and_drop_the_last(images):
    generator = torch.Generator().manual_seed(3)
    ours = batches(images.train, 500, seed=3)
    for _ in range(2):  # epochs of three batches; 27 images are left over
        order = torch.randperm(1527, generator=generator)
        for start in (0, 500, 1000):
            assert next(ours).equal(images.train[order[start : start + 500]])


def test_bad_data(tmp_path, images):
    with pytest.raises(ValueError, match="data must be one of 'digits', 'mnist', got 'faces'"):
        load("faces", tmp_path)
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match="--data-dir.*--download"):
        mnist(tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at most 1527, .* got 1528"):
        batches(images.train, 1528, 0)


# --- One condition -> one record -------------------------------------------------------------------------------------


def test_rows_are_dense_at_first_and_hold_both_sides_of_every_refresh_mark():
    steps = row_steps(301)
    assert steps[:11] == tuple(range(11)) and steps[-1] == 300 and list(steps) == sorted(set(steps))
    assert {49, 50, 99, 100, 199, 200, 299, 300} <= set(steps)
    assert row_steps(1) == (0,) and row_steps(8)[-1] == 7


def test_bad_condition_names_the_field():
    bad = dict(steps=0, seed=-1, features=1, batch_size=2.5, resample_every=-1, lr=0, eps=-1, diversity_weight=-0.1)
    bad |= dict(data="faces", loss="l2", inputs="white", activation="tanh", diversity="rank")
    for field, value in bad.items():
        with pytest.raises((TypeError, ValueError), match=f"{field} must be .* got {value!r}"):
            condition(**{field: value})


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_control_is_a_plain_network_bit_for_bit(images, loss):
    """Its weights are those of a loop written out with torch alone."""
    control = condition(seed=5, loss=loss).control()
    training = trained(control, images, rows=(0, 3))
    assert type(training.model.encoder) is nn.Linear

    torch.manual_seed(5)
    encoder, decoder = nn.Linear(64, 64), nn.Linear(64, 64)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)
    order = torch.randperm(1527, generator=torch.Generator().manual_seed(5))
    for step in range(12):
        x = images.train[order[32 * step : 32 * step + 32]]
        output = torch.sigmoid(decoder(torch.relu(encoder(x))))
        optimizer.zero_grad()
        {"l1": nn.L1Loss(), "mse": nn.MSELoss()}[loss](output, x).backward()
        optimizer.step()
    assert training.model.encoder.weight.equal(encoder.weight) and training.model.decoder.bias.equal(decoder.bias)


def test_bcl_and_control_start_equal_and_see_equal_batches(images):
    pair = [Training(each, images, ()) for each in (condition(), condition().control())]
    for name, value in pair[1].model.state_dict().items():
        assert pair[0].model.state_dict()[name].equal(value)
    assert next(pair[0]._batches).equal(next(pair[1]._batches))


def test_measuring_changes_nothing_and_equal_conditions_give_equal_records(images):
    dense, sparse = trained(condition(), images, range(12)), trained(condition(), images, ())
    assert dense.model.encoder.weight.equal(sparse.model.encoder.weight)
    assert record(condition(), images) == record(condition(), images)
    assert record(condition(seed=1), images)["rows"] != record(condition(), images)["rows"]


@pytest.mark.parametrize("options", [{}, dict(som_space="offset")], ids=str)
def test_row_holds_the_state_before_the_update_and_the_forces_of_the_step(images, options):
    config = BCLConfig(som_lr=0.01, **options)
    training = Training(condition(config=config), images, rows=(1,))
    training.step()
    before = training.model.encoder_weight.clone()
    row = training.step()
    after = training.model.encoder_weight
    assert row["step"] == 1 and training.rows == [row]
    assert row["wt_sim"] == pytest.approx(diagnostics.row_cosine(before), abs=1e-6)
    assert row["wt_sim_post"] == pytest.approx(diagnostics.row_cosine(after), abs=1e-6)
    moved = torch.linalg.vector_norm(after - before, dim=1).mean().item()
    assert abs(row["adam"] - row["pull"]) <= moved + 1e-6 <= row["adam"] + row["pull"] + 2e-6
    assert row["adam_over_pull"] == pytest.approx(row["adam"] / row["pull"])
    assert 0 < row["loss"] < 1


def test_control_is_measured_as_if_its_features_competed(images):
    """At step 0 both have the same weights: every metric of the state is that of BCL; nothing is pulled."""
    with_bcl, plain = (record(each, images, rows=(0,))["rows"][0] for each in (condition(), condition().control()))
    assert with_bcl.keys() == plain.keys() and plain["pull"] == 0 and math.isnan(plain["adam_over_pull"])
    for name in ("loss", "aff_corr", "tgt_sim", "wt_sim", "alive", "novelty", "coverage_cv"):
        assert plain[name] == with_bcl[name]


OPTIONS = {
    "inputs": dict(inputs="centered"),
    "activation": dict(activation="none"),
    "weight similarity": dict(diversity="weight_similarity", diversity_weight=0.5),
    "entropy": dict(diversity="activation_entropy", diversity_weight=0.5),
    "redrawn": dict(resample_every=4),
    "eps": dict(eps=1e-3),
}


@pytest.mark.parametrize("bcl, name", [*((True, name) for name in OPTIONS), (False, "redrawn")])
def test_every_option_changes_the_run_and_measuring_it_does_not(images, bcl, name):
    options = OPTIONS[name]
    base = condition() if bcl else condition().control()
    if "resample_every" in options:
        images = Images("digits", images.train * (images.train > 2), images.held_out, images.shape)  # black: all dead
    plain, changed = Training(base, images, ()), Training(dataclasses.replace(base, **options), images, ())
    measured = Training(changed.condition, images, range(12))
    for training in (plain, changed, measured):
        if "resample_every" in options:
            torch.nn.init.constant_(training.model.encoder.bias, -1.0)
        advance([training], lambda rows: None)
    assert not plain.model.encoder.weight.equal(changed.model.encoder.weight)
    for name, value in changed.model.state_dict().items():
        if not name.endswith("neighbors"):  # of a plain network's, there are none
            assert value.equal(measured.model.state_dict()[name]), name


def test_centered_inputs_and_no_activation_by_hand(images):
    training = Training(condition(inputs="centered", activation="none").control(), images, ())
    x, model = images.train[:5], training.model
    expected = model.decoder(model.encoder(x - images.train.mean(dim=0))).sigmoid()
    assert model(x).equal(expected) and model.fires(x).equal((model.encode(x) > 0).any(dim=0))


@pytest.mark.parametrize("diversity", ["weight_similarity", "activation_entropy"])
def test_diversity_term_is_in_the_gradient_and_not_in_the_loss(images, diversity):
    base = condition().control()
    changed = dataclasses.replace(base, diversity=diversity, diversity_weight=2.0)
    plain, with_term = (Training(each, images, ()) for each in (base, changed))
    batch = images.train[:32]
    assert plain._backward(batch).equal(with_term._backward(batch))
    encoder = plain.model.encoder
    before, W = encoder.weight.grad.clone(), encoder.weight
    encoder.weight.grad = None
    term = losses.weight_similarity_loss(W) if diversity == "weight_similarity" else None
    (2 * (losses.activation_entropy_loss(encoder(batch)) if term is None else term)).backward()
    torch.testing.assert_close(with_term.model.encoder.weight.grad, before + W.grad)


def test_redraw_renews_dead_features_and_only_them(images):
    training = trained(condition(), images, ())
    model, state = training.model, training._optimizer.state
    before = {name: value.clone() for name, value in model.named_parameters()}
    dead = torch.arange(64) % 3 == 0
    model.redraw(dead, training._optimizer, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        part = parameter.T if name == "decoder.weight" else parameter
        old, moment = before[name], state[parameter]["exp_avg"]
        old, moment = (old.T, moment.T) if name == "decoder.weight" else (old, moment)
        if name == "decoder.bias":
            assert part.equal(old)
            continue
        assert part[~dead].equal(old[~dead]) and not (part[dead] == old[dead]).any()
        assert part[dead].abs().max() <= 1 / 8 and part[dead].std() > 0.05  # uniform up to 1 / sqrt(64)
        assert (moment[dead] == 0).all() and (moment[~dead] != 0).any()


def test_mean_loss_is_the_mean_since_the_row_before(images):
    every = record(condition(), images, rows=range(12))["rows"]
    some = record(condition(), images, rows=(2, 7))["rows"]
    losses = [row["loss"] for row in every]
    assert [row["mean_loss"] for row in every] == pytest.approx(losses)
    assert [row["mean_loss"] for row in some] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:8]) / 5])


def test_snapshot_holds_what_pictures_need(images):
    training = trained(condition(), images, rows=(0, 5, 11))
    snapshot = training.snapshot()
    shapes = dict.fromkeys(("gradient", "pull", "adam", "win_rate"), (3, 64))
    shapes |= dict.fromkeys(("weight", "rescue_target"), (64, 64)) | dict.fromkeys(
        ("images", "reconstruction"), (16, 64)
    )
    shapes |= dict(step=(3,), image_coverage=(3, 32))
    assert {name: tuple(tensor.shape) for name, tensor in snapshot.items()} == shapes
    assert snapshot["step"].tolist() == [0, 5, 11]
    for name in ("gradient", "pull", "adam"):
        assert snapshot[name].mean(dim=1).tolist() == pytest.approx([row[name] for row in training.rows])
    assert snapshot["weight"].equal(training.model.encoder_weight)


def test_record_is_plain_and_complete(images):
    found = record(condition(backend="reference"), images, rows=(0, 11))
    assert found["backend"] == "reference" and found["steps_done"] == 12 and not found["interrupted"]
    assert [row["step"] for row in found["rows"]] == [0, 11]
    assert BCLConfig.from_dict(found["condition"]["config"]) == condition().config
    assert 0 < found["held_out"]["l1"] < 1 and 0 <= found["held_out"]["firing_features"] <= 64
    json.dumps(found)


def test_data_of_another_condition_is_refused():
    other = Images("mnist", torch.zeros(40, 4), torch.zeros(4, 4), (2, 2))
    with pytest.raises(ValueError, match="images must be those of the condition, 'digits', got 'mnist'"):
        Training(condition(), other, ())


def test_encoder_weight_of_the_offset_space_is_the_sum():
    model = Autoencoder(6, 4, BCLConfig(som_space="offset"))
    model.encoder.som_offset.fill_(2.0)
    assert model.encoder_weight.equal(model.encoder.weight.detach() + 2.0)


def test_records_are_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, {"nan": math.nan, "rows": [{"inf": math.inf, "x": 1.5}]})
    assert json.loads(path.read_text()) == {"nan": None, "rows": [{"inf": None, "x": 1.5}]}
    with pytest.raises(TypeError):
        write_record(path, {"bad": object()})
    assert json.loads(path.read_text())["nan"] is None and list(tmp_path.iterdir()) == [path]
