"""What torch does with a module beside calling it: transforms, tracers, exporters, quantizers, readers of `weight`.

In eval() a BCLLayer gives nn.Linear's numbers under all of them; in train() they give the layer's, or raise by name.
"""

import copy
import warnings

import pytest
import torch
from helpers.layers import D, N, batch, make, same, state
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_flatten, tree_map_only

from bcl_fast.attach import attach_bcl
from bcl_fast.layer import BCLLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch: half of what is called here is deprecated
spaces = pytest.mark.parametrize("space", ["weight", "offset"])
VMAP = torch.func.vmap


def evaluated(space="weight", seed=0):
    """A layer in eval() and the nn.Linear that it must equal."""
    layer, linear = make(seed=seed, som_space=space), nn.Linear(N, D)
    with torch.no_grad():
        if space == "offset":
            layer.som_offset.copy_(0.1 * batch(D, seed + 5))
        linear.weight.copy_(layer.weight if space == "weight" else layer.weight + layer.som_offset)
        linear.bias.copy_(layer.bias)
    return layer.eval(), linear.eval()


def outcome(function):
    """What a call returns, or the error it raises."""
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def numbers(result):
    """Every number of a result of tensors, as one list of dense tensors."""
    flat = []
    for value in tree_flatten(result)[0]:
        parts = value.unbind() if isinstance(value, torch.Tensor) and value.is_nested else [value]
        flat += [part.to_dense() if isinstance(part, torch.Tensor) else part for part in parts]
    return flat


def equal(one, other):
    one, other = numbers(one), numbers(other)
    return len(one) == len(other) and all(
        type(a) is type(b) and (a.dtype == b.dtype and a.equal(b) if isinstance(a, torch.Tensor) else a == b)
        for a, b in zip(one, other, strict=True)
    )


# --- eval(): nn.Linear's numbers -------------------------------------------------------------------------------------


def parameters(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def loss(module):
    return lambda parameters, x: torch.func.functional_call(module, parameters, (x,)).square().sum()


def forward_mode(module):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(batch(), batch(seed=2))
        return torch.autograd.forward_ad.unpack_dual(module(dual))


def scripted(module):
    program = torch.jit.script(nn.Sequential(module, nn.Tanh()))
    return program(batch()), torch.jit.script(module)(batch())


def jit_traced(module):
    program = copy.deepcopy(torch.jit.trace(nn.Sequential(module, nn.Tanh()), batch()))
    return program(batch(5))


def fx_traced(module):
    program = copy.deepcopy(torch.fx.symbolic_trace(nn.Sequential(module, nn.Tanh())))
    return program(batch()), torch.fx.symbolic_trace(module)(batch())


def features(module):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = nn.Sequential(module, nn.Tanh()).eval()
    return extraction.create_feature_extractor(model, ["0", "1"])(batch())


def exported(module, **options):
    anywhere = ({0: torch.export.Dim("B", min=2)},)
    program = torch.export.export(module, (batch(),), dynamic_shapes=anywhere, **options).module()
    return program(batch()), program(batch(5))


TRANSFORMS = {
    "grad": lambda m: torch.func.grad(loss(m))(parameters(m), batch()),
    "per-sample gradients": lambda m: VMAP(torch.func.grad(loss(m)), (None, 0))(parameters(m), batch()),
    "vmap": lambda m: VMAP(m)(batch()),
    "jacrev": lambda m: torch.func.jacrev(m)(batch(3)),
    "jacfwd": lambda m: torch.func.jacfwd(m)(batch(3)),
    "hessian": lambda m: torch.func.hessian(lambda x: m(x).tanh().sum())(batch(3)),
    "jvp": lambda m: torch.func.jvp(m, (batch(),), (batch(seed=2),)),
    "forward mode": forward_mode,
    "make_fx": lambda m: make_fx(m)(batch())(batch()),
    "symbolic_trace": fx_traced,
    "create_feature_extractor": features,
    "jit.script": scripted,
    "jit.trace": jit_traced,
    "export": exported,
    "strict export": lambda m: exported(m, strict=True),
    "compile": lambda m: torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager")(batch()),
}


@spaces
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_evaluation_under_a_transform_is_nn_linears(transform, space):
    torch._dynamo.reset()
    layer, linear = evaluated(space)
    before = state(layer)
    assert equal(transform(layer), transform(linear))
    assert same(before, state(layer))


@spaces
def test_an_ensemble_over_stacked_parameters(space):
    pairs, x = [evaluated(space, seed) for seed in range(3)], batch()

    def together(modules):
        stacked = torch.func.stack_module_state(modules)
        base = copy.deepcopy(modules[0]).to("meta")
        return VMAP(lambda state: torch.func.functional_call(base, state, (x,)))(stacked)

    ours, theirs = (together([pair[i] for pair in pairs]) for i in (0, 1))
    torch.testing.assert_close(ours, theirs)


def nested(x, layout):
    return torch.nested.nested_tensor([x[:3], x[:5]], layout=layout)


KINDS = {  # x [B, N] as everything else than a dense float tensor
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
    "complex": lambda x: x.to(torch.complex64),
    "integer": torch.Tensor.long,
    "bool": torch.Tensor.bool,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "mkldnn": torch.Tensor.to_mkldnn,
}


@spaces
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_of_any_input_is_nn_linears(kind, space):
    """The result, or an error where it has one."""
    layer, linear = evaluated(space)
    x = KINDS[kind](batch())
    expected = outcome(lambda: linear(x))
    if isinstance(expected, torch.Tensor):
        assert equal(outcome(lambda: layer(x)), expected)
    else:
        with pytest.raises((RuntimeError, TypeError)):
            layer(x)


@spaces
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str)
def test_evaluation_in_any_dtype_is_nn_linears(dtype, space):
    layer = evaluated(space)[0].to(dtype)
    weight = layer.weight if space == "weight" else layer.weight + layer.som_offset
    assert layer(batch().to(dtype)).equal(F.linear(batch().to(dtype), weight, layer.bias))


def test_conversion_by_swapping(monkeypatch):
    """torch swaps the parameters of tensor subclasses, and all of them where it is told to."""
    layer, linear = evaluated()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    for module in (layer, linear):
        module.double()
    assert layer(batch(dtype=torch.float64)).equal(linear(batch(dtype=torch.float64)))
    before = layer.weight.detach().clone()
    layer.train()(batch(dtype=torch.float64)).sum().backward()
    assert int(layer.step) == 1 and not layer.weight.equal(before)


class Quantized(torch.Tensor):
    """A weight-only quantized weight as libraries make them: int8 inside, and all that it can is to be multiplied.

    It goes on to say its first dtype when it is converted.
    """

    @staticmethod
    def __new__(cls, whole, scale, says):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=says, requires_grad=False)

    def __init__(self, whole, scale, says):
        self.whole, self.scale, self.says = whole, scale, says

    def __tensor_flatten__(self):
        return ["whole", "scale"], self.says

    @staticmethod
    def __tensor_unflatten__(inner, says, size, stride):
        return Quantized(**inner, says=says)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].whole, args[0].scale, args[0].says)
        if function is torch.ops.aten._to_copy.default:
            return Quantized(args[0].whole, args[0].scale.to(kwargs["dtype"]), args[0].says)
        if function not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            raise NotImplementedError(f"{function} of a quantized weight")
        return function(*tree_map_only(Quantized, lambda q: q.whole * q.scale, args), **(kwargs or {}))


@spaces
@pytest.mark.parametrize("says", [torch.float32, torch.int8], ids=str)
def test_evaluation_with_a_quantized_weight_is_nn_linears(says, space):
    layer = evaluated(space)[0]
    weight = layer.weight.detach()
    scale = weight.abs().max() / 127
    whole = (weight / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Quantized(whole, scale, says), requires_grad=False)
    stands = whole * scale if space == "weight" else whole * scale + layer.som_offset
    if space == "weight":
        assert layer(batch()).equal(F.linear(batch(), stands, layer.bias))
    torch.testing.assert_close(layer(batch()), F.linear(batch(), stands, layer.bias))


def test_evaluation_with_a_quantized_weight_in_another_dtype_is_nn_linears():
    modules = evaluated()
    for module in modules:
        whole = (module.weight.detach() * 100).to(torch.int8)
        module.weight = nn.Parameter(Quantized(whole, torch.tensor(0.01), torch.float32), requires_grad=False)
        module.to(torch.bfloat16)
    outputs = [module(batch().bfloat16()) for module in modules]
    assert outputs[0].dtype == torch.bfloat16 and outputs[0].equal(outputs[1])


@spaces
def test_fx_quantization(space):
    quantization = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    outputs = []
    for module in evaluated(space):
        model = nn.Sequential(module, nn.ReLU()).eval()
        prepared = quantization.prepare_fx(model, get_default_qconfig_mapping(), (batch(),))
        prepared(batch())
        outputs.append(quantization.convert_fx(prepared)(batch()))
    if space == "weight":
        assert outputs[0].equal(outputs[1])
    exact = nn.functional.relu(module(batch()))
    errors = [(output - exact).abs().mean() for output in outputs]
    assert errors[0] < 1.5 * errors[1] < 0.1 * exact.abs().mean()


@spaces
def test_dynamic_quantization_of_linears_leaves_the_layer_alone(space):
    """It takes modules of exactly the named types: remove() first to have the layer quantized too."""
    layer, linear = evaluated(space)
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer, nn.Linear(D, N)).eval(), {nn.Linear})
    assert type(model[0]) is BCLLayer and not isinstance(model[1], nn.Linear)
    assert model[0](batch()).equal(linear(batch()))


@spaces
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "prune"],
)
def test_evaluation_with_a_parametrized_weight(wrap, space):
    layer = evaluated(space)[0]
    wrap(layer)
    output, weight = layer(batch()), layer.weight
    assert output.equal(F.linear(batch(), weight if space == "weight" else weight + layer.som_offset, layer.bias))


@spaces
def test_flops_of_an_evaluation(space):
    from torch.utils.flop_counter import FlopCounterMode

    totals = []
    for module in evaluated(space):
        with FlopCounterMode(display=False) as counter:
            module(batch()).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_fusing_a_batch_norm():
    norm = nn.BatchNorm1d(D)
    norm(3 * torch.randn(20, D) + 1)
    fused = [nn.utils.fuse_linear_bn_eval(module, norm.eval()) for module in evaluated()]
    assert fused[0](batch()).equal(fused[1](batch()))


# --- Modules that read `weight` instead of calling the layer ---------------------------------------------------------


def encoders(space, placed):
    """An nn.TransformerEncoderLayer with two BCLLayers, and a plain twin with the weights that stand."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True).eval()
    plain, handles = copy.deepcopy(encoder), []
    for name in ("linear1", "linear2"):
        if placed:
            setattr(encoder, name, BCLLayer.from_linear(getattr(encoder, name), som_space=space))
        else:
            handles.append(attach_bcl(encoder, name, som_space=space))
        layer = getattr(encoder, name)
        if space == "offset":
            layer.som_offset.copy_(0.1 * torch.randn_like(layer.weight))
            with torch.no_grad():
                getattr(plain, name).weight.add_(layer.som_offset)
    return encoder, plain, handles


@spaces
@pytest.mark.parametrize("placed", [False, True], ids=["attached", "placed"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_a_transformer_encoder_layer_evaluates_with_the_offset(mode, placed, space):
    encoder, plain, _ = encoders(space, placed)
    x = torch.randn(3, 5, 12)
    with mode():
        torch.testing.assert_close(encoder(x), plain(x))
        copied = copy.deepcopy(encoder)
        torch.testing.assert_close(copied(x), plain(x))


@spaces
def test_only_the_offset_costs_the_fast_path(space, monkeypatch):
    encoder, plain, handles = encoders(space, placed=False)
    taken, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or fast(*args))
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        encoder(x)
        assert len(taken) == (space == "weight")
        for handle in handles:
            handle.remove()
        output = encoder(x)
        assert len(taken) == 1 + (space == "weight")
        torch.testing.assert_close(output, plain(x))


@spaces
def test_a_transformer_encoder_with_padding(space):
    """It goes over to nested tensors."""
    encoder, plain, _ = encoders(space, placed=False)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        ours, theirs = (nn.TransformerEncoder(m, 2).eval()(x, src_key_padding_mask=padding) for m in (encoder, plain))
    torch.testing.assert_close(ours, theirs)


@spaces
def test_a_transformer_decoder_layer(space):
    torch.manual_seed(0)
    decoder = nn.TransformerDecoderLayer(12, 2, 20, dropout=0.0, batch_first=True).eval()
    plain, x = copy.deepcopy(decoder), torch.randn(3, 5, 12)
    layer = attach_bcl(decoder, "linear1", som_space=space).layer
    if space == "offset":
        layer.som_offset.fill_(0.1)
        with torch.no_grad():
            plain.linear1.weight.add_(0.1)
    with torch.no_grad():
        torch.testing.assert_close(decoder(x, x), plain(x, x))


def test_an_encoder_layer_trains_its_layers():
    encoder, _, handles = encoders("offset", placed=False)
    encoder.train()(torch.randn(3, 5, 12)).square().sum().backward()
    assert [int(handle.layer.step) for handle in handles] == [1, 1]


# --- train(): the layer's numbers, or an error -----------------------------------------------------------------------


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


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED)
def test_training_where_mask_or_pull_would_be_lost_raises(transform, backend):
    layer, other = make(backend), make(backend)
    with pytest.raises((RuntimeError, torch.jit.Error), match=r"functional_call|eval\(\)"):
        transform(layer)
    assert same(state(layer), state(other)) and layer.weight.grad is None
    assert same(train_step(layer, layer), train_step(other, other))


def test_functional_call_on_its_own_parameters_trains():
    layer, other = make(), make()
    own = dict(layer.named_parameters())
    assert same(train_step(lambda x: torch.func.functional_call(layer, own, (x,)), layer), train_step(other, other))


@spaces
def test_a_model_traced_in_training_trains_as_untraced(space):
    """Tools such as torchvision's feature extraction trace a model in both modes, so that an error would not do."""
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


@spaces
@pytest.mark.parametrize("training", [True, False])
def test_meta_tensors_have_nn_linears_shapes(training, space):
    layer, linear = make(device="meta", som_space=space).train(training), nn.Linear(N, D, device="meta")
    for module in (layer, linear):
        x = batch().to("meta").requires_grad_()
        output = module(x)
        output.sum().backward()
        module.seen = [(t.shape, t.dtype, t.device) for t in (output, x.grad, module.weight.grad, module.bias.grad)]
    assert layer.seen == linear.seen


@spaces
@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors_have_nn_linears_shapes(training, space):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        layer = make(som_space=space).train(training)
        x = torch.randn(17, N, requires_grad=True)
        output = layer(x)
        output.sum().backward()
        assert output.shape == (17, D) and x.grad.shape == x.shape and layer.weight.grad.shape == (D, N)


@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_dense_floating_point_inputs_only(kind):
    layer = make()
    before = state(layer)
    with pytest.raises(TypeError, match="input must be dense floating point, got "):
        layer(KINDS[kind](batch()))
    assert same(before, state(layer))


@spaces
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "complex"])
def test_training_takes_dense_floating_point_weights_only(kind, space):
    layer = make(som_space=space)
    layer.weight = nn.Parameter(KINDS[kind](layer.weight.detach()))
    with pytest.raises(TypeError, match="weight must be dense floating point, got "):
        layer(batch())


def test_a_gradient_in_evaluation_warns_of_nothing():
    layer, _ = evaluated("offset")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(batch().requires_grad_()).sum().backward()
