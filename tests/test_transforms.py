"""What torch does with a module besides calling it: transforms, tracers, exporters, quantizers, readers of `weight`.

In eval() a BCLLayer gives nn.Linear's numbers under all of them.
"""

import copy

import pytest
import torch
from helpers.layers import D, N, batch, same, state
from helpers.transforms import KINDS, VMAP, evaluated, loss, parameters
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_flatten, tree_map_only

from bcl_fast.attach import attach_bcl
from bcl_fast.layer import BCLLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch: half of what is called here is deprecated
spaces = pytest.mark.parametrize("space", ["weight", "offset"])


def outcome(module, x):
    """What a module returns, or the error it raises."""
    try:
        return module(x)
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


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_evaluation_under_a_transform_is_nn_linears(transform):
    for space in ("weight", "offset"):
        torch._dynamo.reset()
        layer, linear = evaluated(space)
        before = state(layer)
        assert equal(transform(layer), transform(linear))
        assert same(before, state(layer))


def together(modules, x):
    """The outputs of an ensemble, whose parameters and buffers are stacked."""
    stacked = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    return VMAP(lambda state: torch.func.functional_call(base, state, (x,)))(stacked)


def test_an_ensemble_over_stacked_parameters():
    for space in ("weight", "offset"):
        pairs = [evaluated(space, seed) for seed in range(3)]
        ours, theirs = (together([pair[i] for pair in pairs], batch()) for i in (0, 1))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_of_any_input_is_nn_linears(kind):
    """The result, or an error where it has one."""
    for space in ("weight", "offset"):
        layer, linear = evaluated(space)
        x = KINDS[kind](batch())
        expected, got = outcome(linear, x), outcome(layer, x)
        if isinstance(expected, torch.Tensor):
            assert equal(got, expected)
        else:
            assert isinstance(got, tuple) and issubclass(got[0], (RuntimeError, TypeError))


def test_evaluation_in_any_dtype_is_nn_linears():
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.complex64):
        for space in ("weight", "offset"):
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
    def __new__(cls, integers, scale, says):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=says, requires_grad=False)

    def __init__(self, integers, scale, says):
        self.integers, self.scale, self.says = integers, scale, says

    def __tensor_flatten__(self):
        return ["integers", "scale"], self.says

    @staticmethod
    def __tensor_unflatten__(inner, says, size, stride):
        return Quantized(**inner, says=says)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].integers, args[0].scale, args[0].says)
        if function is torch.ops.aten._to_copy.default:
            return Quantized(args[0].integers, args[0].scale.to(kwargs["dtype"]), args[0].says)
        if function not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            raise NotImplementedError(f"{function} of a quantized weight")
        return function(*tree_map_only(Quantized, lambda q: q.integers * q.scale, args), **(kwargs or {}))


def test_evaluation_with_a_quantized_weight_is_nn_linears():
    for says in (torch.float32, torch.int8):
        for space in ("weight", "offset"):
            layer = evaluated(space)[0]
            weight = layer.weight.detach()
            scale = weight.abs().max() / 127
            integers = (weight / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(Quantized(integers, scale, says), requires_grad=False)
            effective_weight = integers * scale if space == "weight" else integers * scale + layer.som_offset
            if space == "weight":
                assert layer(batch()).equal(F.linear(batch(), effective_weight, layer.bias))
            torch.testing.assert_close(layer(batch()), F.linear(batch(), effective_weight, layer.bias))


def test_evaluation_with_a_quantized_weight_in_another_dtype_is_nn_linears():
    modules = evaluated()
    for module in modules:
        integers = (module.weight.detach() * 100).to(torch.int8)
        module.weight = nn.Parameter(Quantized(integers, torch.tensor(0.01), torch.float32), requires_grad=False)
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


def test_dynamic_quantization_of_linears_leaves_the_layer_alone():
    """It takes modules of exactly the named types: remove() first to have the layer quantized too."""
    for space in ("weight", "offset"):
        layer, linear = evaluated(space)
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer, nn.Linear(D, N)).eval(), {nn.Linear})
        assert type(model[0]) is BCLLayer and not isinstance(model[1], nn.Linear)
        assert model[0](batch()).equal(linear(batch()))


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
def test_evaluation_with_a_parametrized_weight(wrap):
    for space in ("weight", "offset"):
        layer = evaluated(space)[0]
        wrap(layer)
        output, weight = layer(batch()), layer.weight
        assert output.equal(F.linear(batch(), weight if space == "weight" else weight + layer.som_offset, layer.bias))


def test_flops_of_an_evaluation():
    for space in ("weight", "offset"):
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
    """An nn.TransformerEncoderLayer with two BCLLayers, and a plain twin with the effective weights."""
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_a_transformer_encoder_layer_evaluates_with_the_offset(mode):
    for space in ("weight", "offset"):
        for placed in (False, True):
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
