"""Transforms, tracers and exporters of a BCLLayer in train(): the layer's numbers, or an error by name."""

import warnings

import pytest
import torch
from helpers.layers import D, N, batch, make, same, state
from helpers.transforms import KINDS, VMAP, evaluated, loss, parameters
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch: half of what is called here is deprecated
spaces = pytest.mark.parametrize("space", ["weight", "offset"])


def train_step(call, model):
    call(batch()).square().sum().backward()
    return {**state(model), **{name: p.grad.clone() for name, p in model.named_parameters(prefix="gradient")}}


def jit_script_trains(layer):
    torch.jit.script(layer)(batch()).sum().backward()


def foreign(layer):
    return {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}


def forward_mode_trains(layer):
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(batch(), batch()))


REFUSED = {
    "export": lambda m: torch.export.export(m, (batch(),)),
    "strict export": lambda m: torch.export.export(m, (batch(),), strict=True),
    "export of a model": lambda m: torch.export.export(nn.Sequential(m, nn.ReLU()), (batch(),)),
    "symbolic_trace": lambda m: torch.fx.symbolic_trace(m),
    "jit.trace": lambda m: torch.jit.trace(m, batch(), check_trace=False),
    "jit.script": jit_script_trains,
    "make_fx": lambda m: make_fx(m)(batch()),
    "symbolic make_fx": lambda m: make_fx(m, tracing_mode="symbolic")(batch()),
    "pre-dispatch make_fx": lambda m: make_fx(m, pre_dispatch=True)(batch()),
    "grad": lambda m: torch.func.grad(loss(m))(parameters(m), batch()),
    "grad of the input": lambda m: torch.func.grad(lambda x: m(x).sum())(batch()),
    "per-sample gradients": lambda m: VMAP(torch.func.grad(loss(m)), (None, 0))(parameters(m), batch()),
    "vmap": lambda m: VMAP(m)(batch(12).reshape(3, 4, N)),
    "jacrev": lambda m: torch.func.jacrev(m)(batch(3)),
    "jvp": lambda m: torch.func.jvp(m, (batch(),), (batch(),)),
    "forward mode": forward_mode_trains,
    "functional_call": lambda m: torch.func.functional_call(m, foreign(m), (batch(),)).sum().backward(),
}


@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED)
def test_training_where_mask_or_pull_would_be_lost_raises(transform):
    for backend in (None, "reference"):
        layer, other = make(backend), make(backend)
        with pytest.raises((RuntimeError, torch.jit.Error), match=r"functional_call|eval\(\)"):
            transform(layer)
        assert same(state(layer), state(other)) and layer.weight.grad is None
        assert same(train_step(layer, layer), train_step(other, other))


def test_functional_call_on_its_own_parameters_trains():
    layer, other = make(), make()
    own = dict(layer.named_parameters())
    assert same(train_step(lambda x: torch.func.functional_call(layer, own, (x,)), layer), train_step(other, other))


def test_a_model_traced_in_training_trains_as_untraced():
    """Tools such as torchvision's feature extraction trace a model in both modes: an error would stop them."""
    for space in ("weight", "offset"):
        models = [nn.Sequential(make(som_space=space), nn.Tanh()) for _ in range(2)]
        program = torch.fx.symbolic_trace(models[0])
        assert same(train_step(program, program), train_step(models[1], models[1]))
        assert int(program.get_submodule("0").step) == 1


@spaces
def test_a_feature_extractor_trains_and_evaluates(space):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = [nn.Sequential(make(som_space=space), nn.Tanh()).eval() for _ in range(2)]
    extractor = extraction.create_feature_extractor(models[0], {"1": "out"})
    assert extractor(batch())["out"].equal(models[1](batch()))
    for model in (extractor, models[1]):
        model.train()
    steps = train_step(lambda x: extractor(x)["out"], extractor), train_step(models[1], models[1])
    assert same(*steps) and int(extractor.get_submodule("0").step) == 1
    for model in (extractor, models[1]):
        model.eval()
    assert extractor(batch())["out"].equal(models[1](batch()))


def test_meta_tensors_have_nn_linears_shapes():
    for training in (True, False):
        for space in ("weight", "offset"):
            layer, linear = make(device="meta", som_space=space).train(training), nn.Linear(N, D, device="meta")
            for module in (layer, linear):
                x = batch().to("meta").requires_grad_()
                output = module(x)
                output.sum().backward()
                module.seen = [
                    (t.shape, t.dtype, t.device) for t in (output, x.grad, module.weight.grad, module.bias.grad)
                ]
            assert layer.seen == linear.seen


def test_fake_tensors_have_nn_linears_shapes():
    for training in (True, False):
        for space in ("weight", "offset"):
            from torch._subclasses import FakeTensorMode

            with FakeTensorMode():
                layer = make(som_space=space).train(training)
                x = torch.randn(17, N, requires_grad=True)
                output = layer(x)
                output.sum().backward()
                assert output.shape == (17, D) and x.grad.shape == x.shape and layer.weight.grad.shape == (D, N)


def test_training_takes_dense_floating_point_inputs_only():
    for kind in KINDS:
        layer = make()
        before = state(layer)
        with pytest.raises(TypeError, match="input must be dense floating point, got "):
            layer(KINDS[kind](batch()))
        assert same(before, state(layer))


def test_training_takes_dense_floating_point_weights_only():
    for kind in ("sparse_coo", "sparse_csr", "complex"):
        for space in ("weight", "offset"):
            layer = make(som_space=space)
            layer.weight = nn.Parameter(KINDS[kind](layer.weight.detach()))
            with pytest.raises(TypeError, match="weight must be dense floating point, got "):
                layer(batch())


def test_a_gradient_in_evaluation_warns_of_nothing():
    layer, _ = evaluated("offset")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(batch().requires_grad_()).sum().backward()
