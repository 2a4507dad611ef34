"""Layers made plain again, alone or in their model: what is computed then is what nn.Linear computes."""

import copy
import io
import pickle

import pytest
import torch
from helpers.layers import D, N, batch, make, same, state
from helpers.models import deep, fit
from helpers.training import OPTIMIZERS, OPTIONS, network, optimizers, train
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from bcl_fast import BCLLayer, attach_bcl, bind_optimizer, detach_bcl

spaces = pytest.mark.parametrize("space", ["weight", "offset"])


def trained(space="weight", steps=3, **options):
    """A layer that has pulled, so that its offset, if it has one, is not zero."""
    layer = make(som_space=space, som_lr=0.1, **options)
    for seed in range(steps):
        layer(batch(seed=seed, dtype=layer.weight.dtype)).square().mean().backward()
    return layer


# --- effective_weight and to_linear ----------------------------------------------------------------------------------


@spaces
def test_the_effective_weight_is_what_the_layer_multiplies_with(space):
    layer = trained(space)
    weight = layer.effective_weight
    assert weight.equal(layer.weight if space == "weight" else layer.weight + layer.som_offset)
    assert not weight.requires_grad and weight.equal(layer.weight) == (space == "weight")
    assert layer.eval()(batch()).equal(nn.functional.linear(batch(), weight, layer.bias))
    layer.weight.data.add_(1)
    assert weight.equal(layer.weight) == (space == "weight")  # W itself, or a sum of that moment


def test_an_offset_that_nobody_wrote_is_not_in_the_effective_weight(memory):
    layer = make(som_space="offset", device="meta")
    assert layer.effective_weight.is_meta
    layer = layer.to_empty(device="cpu")
    nn.init.ones_(layer.weight)
    with pytest.warns(UserWarning, match="neighbors were never written"):
        assert layer.effective_weight.equal(layer.weight)


@spaces
@pytest.mark.parametrize(
    "dtype, bias",
    [(torch.float32, True), (torch.float64, False), (torch.bfloat16, True), (torch.float16, False)],
    ids=str,
)
def test_to_linear_computes_what_the_layer_does_in_eval(space, dtype, bias):
    layer, x = trained(space, bias=bias, dtype=dtype), batch(dtype=dtype)
    random = torch.get_rng_state()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and (linear.in_features, linear.out_features) == (N, D)
    assert torch.get_rng_state().equal(random)
    assert linear.training and not layer.eval().to_linear().training
    assert linear(x).equal(layer(x)) and linear(x).dtype == dtype and (linear.bias is None) != bias
    other = nn.Linear(N, D, bias, dtype=dtype)
    other.load_state_dict(linear.state_dict(), strict=True)
    assert other(x).equal(linear(x))


@spaces
def test_to_linear_is_independent(space):
    layer = trained(space)
    layer.bias.requires_grad_(False)
    layer.register_forward_hook(lambda *args: pytest.fail("a hook went along"))
    linear, before = layer.to_linear(), state(layer)
    assert linear.weight.requires_grad and not linear.bias.requires_grad and linear.weight.grad is None
    assert {p.data_ptr() for p in linear.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())
    torch.optim.SGD(linear.parameters(), 0.1).zero_grad()
    linear(batch()).square().mean().backward()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.fill_(7)
    assert same(state(layer), before)


def test_to_linear_keeps_strides_of_the_weight_and_the_meta_device():
    layer = make()
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert layer.to_linear().weight.stride() == layer.weight.stride() == (1, D)
    for space in ("weight", "offset"):
        linear = make(device="meta", som_space=space).to_linear()
        assert {parameter.device.type for parameter in linear.parameters()} == {"meta"}
        assert linear.weight.shape == (D, N)


def test_to_linear_of_a_parametrized_layer_has_its_weight():
    layer = parametrizations.weight_norm(make()).eval()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear(batch()).equal(layer(batch())) and linear.weight.is_leaf


# --- detach_bcl ------------------------------------------------------------------------------------------------------


def mixed(space, seed=0):
    """BCLLayers that were built, attached and nested, one in three places; and how many there are."""
    model = deep(seed)
    model[3] = BCLLayer(D, N, som_space=space, **OPTIONS)
    attach_bcl(model, ["0", "1.1"], som_space=space, **OPTIONS)
    model.add_module("again", nn.ModuleDict({"same": model[0]}))
    model.forward = lambda x: model[5](model[4](model[3](model[2](model[1](model[0](x))))))
    return model


def plain_twin(model):
    """Layers of nn.Linear with the weights that the layers of `model` multiply with."""
    twin = deep(seed=9)
    with torch.no_grad():
        for name in ("0", "1.1", "3", "5"):
            layer = model.get_submodule(name)
            twin.get_submodule(name).weight.copy_(getattr(layer, "effective_weight", layer.weight))
            twin.get_submodule(name).bias.copy_(layer.bias)
    return twin


@spaces
@optimizers
def test_a_detached_model_is_the_plain_one_and_trains_on_as_it(space, optimizer):
    model = mixed(space)
    ours = OPTIMIZERS[optimizer](model.parameters())
    bind_optimizer(model, ours)
    fit(model, ours)
    parameters, twin, output = list(model.parameters()), plain_twin(model), model.eval()(batch())
    model.train()
    assert detach_bcl(model) == ["0", "1.1", "3"] and detach_bcl(model) == []
    assert model[0] is model[4] is model.again["same"] and {type(model[0]), type(model[3])} == {nn.Linear}
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model[3].training and model.eval()(batch()).equal(output) and twin.eval()(batch()).equal(output)
    assert not ours._optimizer_step_pre_hooks and not ours._optimizer_step_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in parameters)

    theirs = OPTIMIZERS[optimizer](twin.parameters())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    got, expected = fit(model.train(), ours), fit(twin.train(), theirs)
    assert all(got[name].equal(value) for name, value in expected.items())


def loaded(model):
    other = network(plain=True, seed=4)
    other.load_state_dict(model.state_dict(), strict=True)
    return other


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert pickle.loads(pickle.dumps(model))(batch()).equal(model(batch()))
    return torch.load(file, weights_only=False)


def exported(model):
    program = torch.export.export(model, (batch(),))
    assert not [name for name in program.state_dict if not name.endswith(("weight", "bias"))]
    return program.module()


AFTERWARDS = {
    "load_state_dict": loaded,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "export": exported,
    "quantize": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
    "script": torch.jit.script,
    "compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use", AFTERWARDS)
def test_what_is_made_of_a_detached_model_is_what_is_made_of_a_plain_one(use):
    model, twin = network(som_space="offset"), network(plain=True)
    train(model)
    with torch.no_grad():
        for name in ("0", "1", "3"):
            layer = model.get_submodule(name)
            twin.get_submodule(name).weight.copy_(getattr(layer, "effective_weight", layer.weight))
            twin.get_submodule(name).bias.copy_(layer.bias)
    assert detach_bcl(model) == ["1"]
    made, expected = AFTERWARDS[use](model.eval()), AFTERWARDS[use](twin.eval())
    assert made(batch()).equal(expected(batch()))
    assert use == "quantize" or made(batch()).equal(twin(batch()))


def test_a_layer_is_no_model_to_detach():
    layer = make()
    with pytest.raises(ValueError, match=r"model must hold BCLLayers inside, got a BCLLayer itself: its to_linear\(\)"):
        detach_bcl(layer)
    assert detach_bcl(nn.Linear(N, D)) == []


@pytest.mark.parametrize("mode", [True, False])
def test_mode_hooks_and_flags_are_kept(mode):
    model, log = nn.Sequential(make(som_space="offset"), nn.Tanh()), []
    model[0].weight.requires_grad_(False)
    handles = [
        model[0].register_forward_hook(lambda module, args, output: log.append(("forward", module))),
        model[0].register_forward_pre_hook(lambda module, args: log.append(("pre", module))),
    ]
    model.train(mode)
    detach_bcl(model)
    assert model[0].training == mode and not model[0].weight.requires_grad and model[0].bias.requires_grad
    model(batch())
    assert log == [("pre", model[0]), ("forward", model[0])] and type(model[0]) is nn.Linear
    for handle in handles:
        handle.remove()
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks  # nor any that the offset needed


@spaces
def test_a_layer_without_a_bias_in_float64(space):
    model = nn.Sequential(trained(space, bias=False, dtype=torch.float64))
    linear = model[0].to_linear()
    detach_bcl(model)
    assert type(model[0]) is nn.Linear and model[0].bias is None and list(model.state_dict()) == ["0.weight"]
    assert model[0].weight.equal(linear.weight) and str(model[0]) == str(linear)


@spaces
def test_a_handle_after_detach_does_nothing(space):
    model = nn.Sequential(nn.Linear(N, D), nn.Tanh(), nn.Linear(D, N))
    handle = attach_bcl(model, ["0", "2"], som_space=space, **OPTIONS)
    fit(model, torch.optim.SGD(model.parameters(), 0.1))
    output = model(batch())
    detach_bcl(model)
    before, modules = state(model), list(model)
    handle.remove()
    assert same(state(model), before) and list(model) == modules
    assert model(batch()).equal(output)
    # What the handle keeps shares the weights, and still computes the same.
    assert all(handle.layers[n].eval()(x).equal(model[int(n)](x)) for n, x in (("0", batch()), ("2", batch()[:, :D])))


@spaces
@pytest.mark.parametrize("how", ["detach", "remove"])
@pytest.mark.parametrize("bound", [True, False])
def test_a_forward_of_before_pulls_nothing_any_more(space, how, bound):
    model, twin = (nn.Sequential(nn.Linear(N, D), nn.Tanh()) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    handle, other = (attach_bcl(each, "0", som_space=space, som_lr=0.1) for each in (model, twin))
    other.layer.frozen = True
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if bound:
        handle.bind_optimizer(optimizer)
        model(batch(seed=3)).square().mean().backward()  # its pull waits for a step, and is dropped
        model[0].zero_grad(set_to_none=False)
    before, loss = model[0].weight.detach().clone(), model(batch()).square().mean()
    detach_bcl(model) if how == "detach" else handle.remove()
    loss.backward()
    twin(batch()).square().mean().backward()
    assert model[0].weight.equal(before)
    assert model[0].weight.grad.equal(twin[0].weight.grad)  # masked, as the forward was
    optimizer.step()
    assert model[0].weight.equal(before.add(model[0].weight.grad, alpha=-0.1))


# --- Weights that others have too ------------------------------------------------------------------------------------


def tied(kind):
    """A model whose layer "head" has an offset on a weight of another module, and how that is called."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(D, N), "head": nn.Linear(N, D), "last": nn.Linear(D, N)})
    if kind == "parameter":
        model["head"].weight = model["embedding"].weight
    elif kind == "memory":
        model["head"].weight = nn.Parameter(model["embedding"].weight.data)
    elif kind == "two layers":
        del model["embedding"]
        model["other"] = nn.Linear(N, D)
        model["head"].weight = model["other"].weight
    elif kind == "list":
        model["list"] = nn.ParameterList([torch.ones(2), model["head"].weight])
        return model, "list.1"
    return model, "other.weight" if kind == "two layers" else "embedding.weight"


@pytest.mark.parametrize("kind", ["parameter", "memory", "two layers", "list"])
@pytest.mark.parametrize("how", ["detach", "remove"])
def test_an_offset_is_not_added_to_a_weight_that_others_have(kind, how):
    model, other = tied(kind)
    names = ["last", "head", "other"] if kind == "two layers" else ["last", "head"]
    handle = attach_bcl(model, names, som_space="offset")
    for layer in handle.layers.values():
        layer.som_offset.fill_(0.1)
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=f"'head' has an offset .* '{other}' too") as error:
        detach_bcl(model) if how == "detach" else handle.remove()
    assert ("'other' has an offset" in str(error.value)) == (kind == "two layers")
    assert same(state(model), before) and dict(model.named_modules()) == modules
    with torch.no_grad():
        model["head"].weight = nn.Parameter(model["head"].weight.clone())
    expected = {name: layer.effective_weight for name, layer in handle.layers.items()}
    detach_bcl(model) if how == "detach" else handle.remove()
    assert all(model[name].weight.equal(weight) for name, weight in expected.items())


def test_tied_weights_without_an_offset_stay_tied():
    model, _ = tied("parameter")
    model["head"] = BCLLayer.from_linear(model["head"])
    assert detach_bcl(model) == ["head"]
    assert model["head"].weight is model["embedding"].weight


def spoiled(model, name):
    layer = model[name]
    if name == "patched":
        layer.forward = lambda x: x
    elif name == "normed":
        parametrizations.weight_norm(layer)
    elif name == "more":
        layer.inner = nn.Linear(2, 2)


class Doubling(BCLLayer):
    """A BCLLayer that computes something else."""

    def forward(self, input):
        return 2 * super().forward(input)


STAYS = {
    "patched": "with a forward of its own",
    "subclass": "is a Doubling with a forward",
    "normed": "is parametrized",
    "more": "holds 'inner'",
}


@pytest.mark.parametrize("how", ["detach", "remove"])
def test_one_error_has_everything_that_cannot_be_plain(how):
    model = nn.ModuleDict({name: nn.Linear(N, D) for name in ("fine", "patched", "normed", "more")})
    handle = attach_bcl(model, ["fine", "patched", "normed", "more"], som_space="offset")
    model["subclass"] = Doubling(N, D)
    for name in STAYS:
        spoiled(model, name)
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(ValueError) as error:
        detach_bcl(model) if how == "detach" else handle.remove()
    says = dict(part.split("' ", 1) for part in str(error.value).partition("but '")[2].split("; '"))
    assert says.keys() == STAYS.keys() - ({"subclass"} if how == "remove" else set())  # which was not attached
    assert all(STAYS[name] in reason for name, reason in says.items())
    assert same(state(model), before) and dict(model.named_modules()) == modules


def test_a_wrong_offset_leaves_the_model_as_it_was():
    model = nn.Sequential(make(som_space="offset"), nn.Linear(D, N), make(som_space="offset"))
    model[0].som_offset.fill_(0.1)
    model[2].som_offset = torch.full((D, N), torch.nan)
    before, modules = state(model), list(model)
    with pytest.raises(ValueError, match="som_offset must be finite, got nan"):
        detach_bcl(model)
    assert list(model) == modules and model[0].weight.equal(before["0.weight"])


# --- Models that others wrap -----------------------------------------------------------------------------------------


@spaces
def test_a_compiled_model_computes_and_trains_as_the_plain_one(space):
    torch._dynamo.reset()
    model = network(som_space=space)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled)
    output = compiled.eval()(batch())
    assert detach_bcl(compiled) == ["_orig_mod.1"]
    assert compiled.eval()(batch()).equal(output)
    twin = copy.deepcopy(model)
    for each in (compiled.train(), twin.train()):
        F.cross_entropy(each(batch()), torch.arange(17) % 5).backward()
    assert all(one.grad.equal(other.grad) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert model(batch()).equal(twin(batch()))


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # else the machine's name must resolve
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@spaces
def test_a_distributed_model_trains_on_as_the_plain_one(space, one_rank):
    model = network(som_space=space)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped)
    assert detach_bcl(wrapped) == ["module.1"]
    twin = copy.deepcopy(model)
    assert same({name.removeprefix("module."): value for name, value in train(wrapped).items()}, train(twin))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_weight_that_is_spread_over_ranks_is_refused(one_rank):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    model, mesh = nn.Sequential(nn.Linear(N, D), make()), init_device_mesh("cpu", (1,))
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
    with pytest.raises(ValueError, match="'0' has a weight that is spread over ranks"):
        attach_bcl(model, "0")
    with pytest.raises(ValueError, match="'1' has a weight that is spread over ranks"):
        detach_bcl(model)


def test_a_layer_that_torch_compile_holds_is_refused_since_it_would_go_on():
    model = nn.Sequential(torch.compile(make(), backend="eager"))
    with pytest.raises(ValueError, match="'0._orig_mod' is compiled by itself"):
        detach_bcl(model)
    assert isinstance(model[0]._orig_mod, BCLLayer)
