"""Ways in which torch builds, fills and converts a BCLLayer: each continues bit-equal or says by name what is wrong.

Uninitialized memory is what the fixture `memory` says.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers.layers import D, N, batch, each_backend, make, same, state
from helpers.training import DATA, OPTIONS, may_start_afresh, network, train
from torch import nn

from bcl_fast.layer import BCLLayer

SPACES = ("weight", "offset")
SAVED_AT = (0, 4, 6)  # 4: a refresh is due


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def trained(steps=3, **options):
    model = network(**options)
    train(model, data=DATA[:steps])
    return model


def checkpoint(model):
    """What is read from a file of the model's state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def of_linear(model, **options):
    """The same model of plain nn.Linears whose second becomes a BCLLayer now: how starting afresh is meant."""
    twin = network(plain=True)
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in twin.state_dict()})
    twin[1] = BCLLayer.from_linear(twin[1], **{**OPTIONS, **options})
    return twin


def continue_alike(model, twin):
    """Both train on, bit-equal, with an optimizer of their own; the model's backend is the one of its device."""
    assert same(train(model, "adamw", epochs=2), train(twin, "adamw", epochs=2))
    assert model[1].backend == twin[1].backend


# --- Built on the meta device ---------------------------------------------------------------------------------------


def on_meta(**options):
    with torch.device("meta"):
        model = network(**options)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    return model


def test_materialised_and_loaded(memory, no_warning):
    for steps in SAVED_AT:
        for som_space in SPACES:
            for assign in (False, True):
                twin = trained(steps, som_space=som_space)
                model = on_meta(som_space=som_space).to_empty(device="cpu")
                model.load_state_dict(checkpoint(twin), assign=assign)
                assert model.eval()(DATA[0][0]).equal(twin.eval()(DATA[0][0]))
                continue_alike(model, twin)


def test_assigned_to_meta(memory, no_warning):
    for steps in SAVED_AT:
        for som_space in SPACES:
            twin, model = trained(steps, som_space=som_space), on_meta(som_space=som_space)
            model.load_state_dict(checkpoint(twin), assign=True)
            assert model.eval()(DATA[0][0]).equal(twin.eval()(DATA[0][0]))
            continue_alike(model, twin)


def test_plain_checkpoint_on_meta(memory, no_warning):
    for som_space in SPACES:
        for empty in (True, False):
            plain, model = network(plain=True), on_meta(som_space=som_space)
            if empty:
                model.to_empty(device="cpu").load_state_dict(checkpoint(plain))
            else:
                model.load_state_dict(checkpoint(plain), assign=True)
            continue_alike(model, of_linear(plain, som_space=som_space))


def test_materialised_and_reset(memory, no_warning):
    for som_space in SPACES:
        model = on_meta(som_space=som_space).to_empty(device="cpu")
        torch.manual_seed(0)
        for i in (1, 0, 3):  # as `network` draws them
            model[i].reset_parameters()
        continue_alike(model, network(som_space=som_space))


def give_weights(model):
    """New weights, written by hand into whatever is there."""
    source = network(plain=True, seed=5)
    with torch.no_grad():
        for name, value in source.named_parameters():
            model.get_parameter(name).copy_(value)
    return source


def test_materialised_and_given_weights_alone(memory):
    """Nobody filled the buffers: the layer starts afresh and says so."""
    for som_space in SPACES:
        model = on_meta(som_space=som_space).to_empty(device="cpu")
        give_weights(model)
        twin = of_linear(model, som_space=som_space)
        with pytest.warns(UserWarning, match="neighbors"):
            got = train(model)
        assert same(got, train(twin))
        continue_alike(model, twin)


def test_evaluated_before_it_starts_afresh(memory):
    """An offset that was never written takes part in no output."""
    for som_space in SPACES:
        model = on_meta(som_space=som_space).to_empty(device="cpu")
        source = give_weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert model.eval()(DATA[0][0]).equal(source.eval()(DATA[0][0]))


def test_skip_init(memory):
    layer = nn.utils.skip_init(BCLLayer, N, D, **OPTIONS)
    model = network()
    model[1] = layer
    give_weights(model)
    twin = of_linear(model)
    with pytest.warns(UserWarning, match="neighbors"):
        got = train(model)
    assert same(got, train(twin))


def test_skip_init_and_loaded(memory, no_warning):
    twin, model = trained(6), network()
    model[1] = nn.utils.skip_init(BCLLayer, N, D, **OPTIONS)
    model.load_state_dict(checkpoint(twin))
    continue_alike(model, twin)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_while_on_meta(memory, no_warning, how):
    twin, model = trained(6), on_meta()
    model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    model.to_empty(device="cpu").load_state_dict(checkpoint(twin))
    continue_alike(model, twin)


# --- Loaded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["copy", "assign", "mapped"])
def test_loaded_over_what_was_there(tmp_path, no_warning, how):
    for steps in SAVED_AT:
        for som_space in SPACES:
            for begun in (0, 2):
                twin, model = trained(steps, som_space=som_space), trained(begun, seed=7, som_space=som_space)
                torch.save(twin.state_dict(), tmp_path / "model.pt")
                state_dict = torch.load(tmp_path / "model.pt", weights_only=True, mmap=how == "mapped")
                model.load_state_dict(state_dict, assign=how != "copy")
                continue_alike(model, twin)


@pytest.mark.parametrize("missing", ["neighbors", "step"])
def test_part_of_the_buffers_starts_afresh(missing):
    """A step without its neighbors, or neighbors without their step, is no competition to go on with."""
    for assign in (False, True):
        for begun in (0, 2):
            model, state_dict = trained(begun, seed=7), checkpoint(trained(3))
            del state_dict["1." + missing]
            with pytest.warns(UserWarning, match=missing):
                result = model.load_state_dict(state_dict, strict=False, assign=assign)
                twin = of_linear(model)
                got = train(model)
            assert result.missing_keys == ["1." + missing] and same(got, train(twin))


@pytest.mark.parametrize("name", ["neighbors", "step"])
def test_a_narrower_integer_is_the_same_number(no_warning, name):
    for assign in (False, True):
        for dtype in (torch.int32, torch.int16):
            twin = trained(3)
            state_dict, model = checkpoint(twin), network(seed=7)
            state_dict["1." + name] = state_dict["1." + name].to(dtype)
            model.load_state_dict(state_dict, assign=assign)
            continue_alike(model, twin)
            assert model[1].neighbors.dtype == model[1].step.dtype == torch.int64


def at(row, column, value):
    def spoil(neighbors):
        neighbors[row, column] = value(neighbors) if callable(value) else value
        return neighbors

    return spoil


# Buffer, how it is spoilt, and what the message must show of it.
BAD = {
    "float neighbors": ("neighbors", torch.Tensor.float, "torch.float32"),
    "half neighbors": ("neighbors", torch.Tensor.half, "torch.float16"),
    "negative step": ("step", lambda step: step - 8, "-5"),
    "float step": ("step", torch.Tensor.float, "torch.float32"),
    "nan offset": ("som_offset", at(2, 1, torch.nan), "(?i)nan"),
    "infinite offset": ("som_offset", at(2, 1, -torch.inf), "(?i)inf"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_refused_by_name(kind):
    """When it is loaded, or at the latest when a training forward would trust it."""
    for assign in (False, True):
        name, spoil, shown = BAD[kind]
        model = network(som_space="offset")
        state_dict = checkpoint(trained(3, som_space="offset"))
        state_dict["1." + name] = spoil(state_dict["1." + name])
        with pytest.raises(ValueError, match=f"{name} must .*got.*") as caught:
            model.load_state_dict(state_dict, assign=assign)
            train(model)
        assert caught.match(shown)


# What no neighbors are, as the mean of several models' buffers.
NO_NEIGHBORS = {
    "out of range": (at(2, 1, D), "11"),
    "far out of range": (at(2, 1, 2**40), str(2**40)),
    "negative": (at(2, 1, -1), "-1"),
    "itself": (at(2, 1, 2), "2"),
    "doubled": (at(2, 1, lambda neighbors: neighbors[2, 0].item()), ","),
}


@pytest.mark.parametrize("how", ["attribute", "in place", "loaded", "assigned"])
@pytest.mark.parametrize("space", ["weight", "offset"])
def test_neighbors_that_are_none_start_afresh(how, space):
    """And say so, once. The offset is a part of the weight, which stays."""
    for spoil, shown in NO_NEIGHBORS.values():
        model = trained(3, som_space=space)
        with pytest.warns(UserWarning, match=f"neighbors must .*got .*{shown}.* for feature 2: .* afresh") as caught:
            if how == "in place":
                spoil(model[1].neighbors)
            elif how == "attribute":
                model[1].neighbors = spoil(model[1].neighbors.clone())
            else:
                state_dict = checkpoint(model)
                spoil(state_dict["1.neighbors"])
                model.load_state_dict(state_dict, assign=how == "assigned")
                assert int(model[1].step) == 0
            twin = of_linear(model, som_space=space)
            if space == "offset":
                assert model[1].som_offset.any()
                twin[1].som_offset.copy_(model[1].som_offset)
            got = train(model)
        assert len(caught) == 1 and same(got, train(twin))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("neighbors", torch.zeros(D, 4, dtype=torch.int64), r"neighbors must .*\[11, 3\].*got.*\[11, 4\]"),
        ("neighbors", torch.zeros(D - 1, 3, dtype=torch.int64), r"neighbors must .*\[11, 3\].*got.*\[10, 3\]"),
        ("step", torch.tensor([3]), r"step must .*got.*\[1\]"),
        ("step", torch.tensor(-1), "step must .*got.*-1"),
    ],
)
def test_a_buffer_of_another_shape_is_refused(name, value, message):
    model = trained(3)
    setattr(model[1], name, value)
    with pytest.raises(ValueError, match=message):
        train(model)


def test_good_buffers_written_by_hand_are_trusted(no_warning):
    twin, model = trained(6), network(seed=7)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            model.get_parameter(name).copy_(value)
        model[1].neighbors.copy_(twin[1].neighbors)
    model[1].step = twin[1].step.clone()
    continue_alike(model, twin)


def test_a_step_written_past_its_version_is_read():
    """On the CPU the counter is read, not remembered."""
    layer, other = make(recompute_every=5), make(recompute_every=5)
    for each in (layer, other):
        each(batch()).square().sum().backward()
    layer.step.data.fill_(5)
    with torch.no_grad():
        other.step.fill_(5)
    for each in (layer, other):
        each.zero_grad()
        each(batch(seed=2)).square().sum().backward()
    assert same(state(layer), state(other)) and int(layer._refreshed_at) == 5
    layer.step.data.fill_(-4)
    with pytest.raises(ValueError, match="step must be >= 0, got -4"):
        layer(batch())


@each_backend
def test_neighbors_written_past_their_version_count_as_the_nearest_index(backend):
    for value in (-5, D, 2**40, -(2**63), 2**63 - 1):
        layer, other = make(backend), make(backend)
        for each in (layer, other):
            each(batch()).square().sum().backward()
        layer.neighbors.data[2:6, 1] = value
        other.neighbors.data[2:6, 1] = min(max(value, 0), D - 1)
        for each in (layer, other):
            each.zero_grad()
            each(batch(seed=2)).square().sum().backward()
        assert layer.weight.equal(other.weight) and layer.weight.grad.equal(other.weight.grad)


def test_the_backend_is_chosen_again_for_another_weight():
    """As accelerate and transformers fill a layer of the meta device: past load_state_dict."""
    with torch.device("meta"):
        layer = make()
    twin = make()
    assert layer.backend == "portable"
    layer.weight, layer.bias = nn.Parameter(twin.weight.detach().clone()), nn.Parameter(twin.bias.detach().clone())
    for each in (layer, twin):
        each(batch()).square().sum().backward()
    assert layer.backend == twin.backend == "cpu" and same(state(layer), state(twin))


# --- Conversions ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["data", "overwrite", "swap"])
def conversion(request, no_warning):
    """The three ways in which torch puts a converted parameter into its module."""
    future, names = torch.__future__, ("overwrite", "swap")
    before = [getattr(future, f"get_{name}_module_params_on_conversion")() for name in names]
    setters = [getattr(future, f"set_{name}_module_params_on_conversion") for name in names]
    for name, setter in zip(names, setters, strict=True):
        setter(request.param == name)
    yield request.param
    for value, setter in zip(before, setters, strict=True):
        setter(value)


def widened(model):
    """The same state in float64, in a model that was made so."""
    twin = network(som_space=model[1].config.som_space).double()
    twin.load_state_dict({name: v.double() if v.is_floating_point() else v for name, v in model.state_dict().items()})
    return twin


def test_to_another_dtype(conversion):
    for som_space in SPACES:
        for bound in (True, False):
            model = network(som_space=som_space)
            train(model, data=DATA[:3], bound=bound)
            twin, data = widened(model), [(x.double(), y) for x, y in DATA]
            model.to(torch.float64)
            assert same(train(model, "adamw", data=data, bound=bound), train(twin, "adamw", data=data, bound=bound))


def test_to_meta_and_back(conversion, memory):
    for som_space in SPACES:
        twin = trained(6, som_space=som_space)
        state_dict, model = checkpoint(twin), trained(2, som_space=som_space)
        model.to("meta").to_empty(device="cpu").load_state_dict(state_dict)
        continue_alike(model, twin)


def test_loaded_in_every_conversion(conversion):
    """begun = steps of the checkpoint too: a counter of the same age holds another number."""
    for som_space in SPACES:
        for assign in (False, True):
            for begun in (0, 4):
                twin, model = trained(4, som_space=som_space), trained(begun, seed=7, som_space=som_space)
                model.load_state_dict(checkpoint(twin), assign=assign)
                continue_alike(model, twin)
                model.load_state_dict(checkpoint(trained(6, som_space=som_space)), assign=assign)
                continue_alike(model, trained(6, som_space=som_space))


@may_start_afresh
def test_a_layer_alone_pulls_after_every_conversion(conversion):
    """The hook follows the parameter that is there."""
    layer = make()
    for dtype in (torch.float64, torch.float32, torch.float64):
        layer.to(dtype)
        step, before = int(layer.step), layer.weight.detach().clone()
        layer(DATA[0][0].to(dtype)).sum().backward()
        assert int(layer.step) == step + 1 and not layer.weight.equal(before)
        layer.zero_grad()


def test_checkpoint_of_a_trained_layer_is_what_it_was():
    """Guards the helper: states of models above are not shared between a model and its checkpoint."""
    model = trained(3)
    kept, before = checkpoint(model), state(model)
    train(model)
    assert same(kept, before) and not same(kept, state(model))
