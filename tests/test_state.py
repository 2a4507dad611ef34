"""The state of a layer: checkpoints, copies, parameters that are replaced, and Linears that become layers and back."""

import copy
import io
import pickle

import pytest
import torch
from helpers.layers import D, N, batch, each_backend, make, same, state, train
from torch import nn

from bcl_fast import reference as ref
from bcl_fast.attach import AttachedBCL, attach_bcl
from bcl_fast.layer import BCLLayer


@each_backend
@pytest.mark.parametrize("options", [{}, dict(som_space="offset"), dict(dtype=torch.bfloat16)], ids=str)
def test_resumed_run_is_bit_equal_across_the_refresh(backend, options):
    for saved_at in (4, 5, 6):
        through, first, resumed = (make(backend, seed, recompute_every=5, **options) for seed in (0, 0, 7))
        train(through, 12)
        train(first, saved_at)
        saved = io.BytesIO()
        torch.save(first.state_dict(), saved)
        saved.seek(0)
        resumed.load_state_dict(torch.load(saved))
        train(resumed, 12 - saved_at, saved_at)
        assert same(state(through), state(resumed))


def test_checkpoint_of_a_plain_linear_loads_and_starts_afresh():
    layer, linear = make(som_space="offset", recompute_every=2), nn.Linear(N, D)
    train(layer, 3)
    assert layer.load_state_dict(linear.state_dict()) == ([], [])
    assert layer.weight.equal(linear.weight) and int(layer.step) == 0 and layer.som_offset.count_nonzero() == 0
    layer(batch()).sum().backward()
    assert layer.neighbors.equal(ref.neighbors(linear.weight.detach(), 3))


def test_checkpoint_of_a_plain_model_loads_into_one_with_layers():
    plain = nn.Sequential(nn.Linear(N, D), nn.ReLU(), nn.Linear(D, N))
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(D, N))
    checkpoint = plain.state_dict()
    model.load_state_dict(checkpoint)
    assert list(checkpoint) == list(plain.state_dict())  # the caller's dict is left alone
    assert model[0].weight.equal(plain[0].weight)


def test_bad_checkpoints_raise():
    layer = make()
    partial = layer.state_dict()
    del partial["step"]
    with pytest.raises(RuntimeError, match='Missing key.*"step"'):
        make().load_state_dict(partial)
    with pytest.raises(RuntimeError, match="size mismatch for neighbors"):
        make(neighborhood_k=4).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_by_themselves(how):
    layer, trained = make(), 3
    train(layer, trained)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same(state(layer), state(twin))
    before = state(layer)
    train(twin, 3, start=trained)
    assert same(before, state(layer)), "training the copy moved the original"
    train(layer, 3, start=trained)
    assert same(state(layer), state(twin))


@pytest.mark.parametrize("how", ["to_empty", "assign", "new parameter", "to dtype"])
def test_pull_survives_a_replaced_parameter(how):
    layer = make()
    train(layer, 1)
    if how == "to_empty":
        layer.to_empty(device="cpu")
        layer.reset_parameters()
    elif how == "assign":
        layer.load_state_dict(make(seed=3).state_dict(), assign=True)
    elif how == "new parameter":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        layer.to(torch.float64)
    start, dtype = int(layer.step), layer.weight.dtype
    before = layer.weight.detach().clone()
    layer(batch(dtype=dtype)).sum().backward()
    assert int(layer.step) == start + 1 and not layer.weight.equal(before)


def test_reset_parameters_resets_the_competition():
    layer = make()
    train(layer, 3)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert same(state(layer), state(make()))


def test_built_on_meta_and_materialised():
    layer = make(device="meta")
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    train(layer, 2)
    other = make()
    train(other, 2)
    assert same(state(layer), state(other))


def test_a_deleted_layer_leaves_its_weight_trainable():
    layer = make()
    weight = layer.weight
    del layer
    (weight.sum() * 2).backward()
    assert weight.grad.equal(torch.full_like(weight, 2.0))


# --- from_linear and attach_bcl --------------------------------------------------------------------------------------


def test_from_linear_shares_parameters_mode_and_draws_no_random_numbers():
    linear = nn.Linear(N, D, dtype=torch.float64).eval()
    random = torch.get_rng_state()
    layer = BCLLayer.from_linear(linear, rescue_k=2, backend="reference")
    assert torch.get_rng_state().equal(random)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.config.rescue_k == 2 and layer.backend == "reference"
    layer.train()(batch(dtype=torch.float64)).sum().backward()
    assert int(layer.step) == 1
    assert BCLLayer.from_linear(nn.Linear(N, D, bias=False)).bias is None
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got ReLU"):
        BCLLayer.from_linear(nn.ReLU())


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(N, D), nn.ReLU()), "decoder": nn.Linear(D, N)})


def test_attach_trains_in_place_and_remove_restores_a_linear():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    original = net["encoder"][0]
    handle = attach_bcl(net, "encoder.0", som_lr=0.1)
    assert isinstance(handle, AttachedBCL) and net["encoder"][0] is handle.layer
    assert handle.layer.weight is original.weight  # the optimizer stays valid
    net["decoder"](net["encoder"](batch())).square().mean().backward()
    optimizer.step()
    assert int(handle.layer.step) == 1
    trained = handle.layer.weight.detach().clone()
    handle.remove()
    handle.remove()
    assert net["encoder"][0] is original and type(original) is nn.Linear and original.weight.equal(trained)
    net["decoder"](net["encoder"](batch())).square().mean().backward()
    assert original.weight.equal(trained) and int(handle.layer.step) == 1


def test_remove_adds_the_offset_so_that_the_output_stays():
    net = model()
    handle = attach_bcl(net, "encoder.0", som_space="offset", som_lr=0.5)
    net["encoder"](batch()).square().mean().backward()
    assert handle.layer.som_offset.count_nonzero()
    before = net.eval()["encoder"](batch())
    handle.remove()
    assert net["encoder"](batch()).equal(before)


@pytest.mark.parametrize("name", ["encoder.1", "encoder", "nowhere", ""])
def test_attach_lists_the_linears_for_a_bad_name(name):
    with pytest.raises(ValueError, match=r"one of \['encoder.0', 'decoder'\], got '" + name):
        attach_bcl(model(), name)
