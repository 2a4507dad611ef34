"""attach_bcl on what is not a plain product, or not in one place: carried over completely, or refused by name."""

import copy
import warnings

import pytest
import torch
from helpers.layers import D, N, batch, make, same, state
from torch import nn
from torch.nn.utils import parametrizations, prune

from bcl_fast.attach import attach_bcl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def linear(kind=nn.Linear, seed=0, **options):
    torch.manual_seed(seed)
    return kind(N, D, **options)


def step(model, x):
    model(x).square().mean().backward()


def refused(model, name, words):
    """attach_bcl raises an error that says the name and one of these words, and leaves the model as it was."""
    modules = dict(model.named_modules(remove_duplicate=False))
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in modules.items()}
    with pytest.raises((TypeError, ValueError), match=f"(?s)'{name}'") as error:
        attach_bcl(model, name)
    assert any(word in str(error.value) for word in words), str(error.value)
    after = dict(model.named_modules(remove_duplicate=False))
    assert all(after[n] is m for n, m in modules.items()) and after.keys() == modules.keys()
    assert hooks == {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in after.items()}


# --- What is no plain product ----------------------------------------------------------------------------------------


class LowRank(nn.Linear):
    """A linear layer with an adapter, as LoRA writes them."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.down, self.up = nn.Linear(N, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, input):
        return super().forward(input) + self.up(self.down(input))


class Named(nn.Linear):
    """A linear layer under another name."""


def test_a_subclass_with_its_own_forward_is_refused():
    refused(nn.Sequential(linear(LowRank), nn.ReLU()), "0", ["LowRank"])


def test_an_instance_with_its_own_forward_is_refused():
    model = nn.Sequential(linear())
    model[0].forward = lambda input: nn.functional.linear(input, model[0].weight) + 1
    refused(model, "0", ["forward"])


def test_the_parts_of_a_subclass_with_its_own_forward_may_be_attached():
    model = nn.Sequential(linear(LowRank))
    layer = attach_bcl(model, "0.down").layer
    step(model, batch())
    assert model[0].down is layer and int(layer.step) == 1


@pytest.mark.parametrize("kind", [Named, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_a_subclass_without_its_own_forward_is_fine(kind):
    model, plain = nn.Sequential(linear(kind)), nn.Sequential(linear())
    original = model[0]
    handles = [attach_bcl(each, "0") for each in (model, plain)]
    for each in (model, plain):
        step(each, batch())
    assert same(state(model), state(plain)) and int(model[0].step) == 1
    handles[0].remove()
    assert model[0] is original and type(model[0]) is kind


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "prune bias": lambda module: prune.l1_unstructured(module, "bias", 0.5),
    "bias": lambda module: nn.utils.parametrize.register_parametrization(module, "bias", nn.Tanh()),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_parametrized_layer_is_refused(wrap):
    model = nn.Sequential(linear(), nn.ReLU())
    wrap(model[0])
    refused(model, "0", ["parametri", "prune"])


def test_a_layer_whose_pruning_was_made_permanent_is_fine():
    model = nn.Sequential(linear())
    prune.remove(prune.l1_unstructured(model[0], "weight", 0.5), "weight")
    layer = attach_bcl(model, "0").layer
    step(model, batch())
    assert model[0] is layer and int(layer.step) == 1


def test_what_is_a_bcl_layer_already_is_refused():
    refused(nn.Sequential(make(), nn.Linear(D, N)), "0", ["BCLLayer"])
    model = nn.Sequential(linear())
    attach_bcl(model, "0")
    refused(model, "0", ["BCLLayer"])


def test_a_lazy_layer_is_refused_until_it_has_run():
    model = nn.Sequential(nn.LazyLinear(D))
    refused(model, "0", ["Lazy"])
    model(batch())
    attach_bcl(model, "0")
    step(model, batch())
    assert int(model[0].step) == 1


@pytest.mark.parametrize("how", ["dynamic", "qat", "script"])
def test_quantized_and_scripted_layers_are_refused(how):
    model = nn.Sequential(linear()).eval()
    if how == "dynamic":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    elif how == "qat":
        qat = torch.ao.nn.qat.Linear(N, D, qconfig=torch.ao.quantization.get_default_qat_qconfig())
        model = nn.Sequential(qat)
    else:
        model = torch.jit.script(model)
    refused(model, "0", ["nn.Linear"])


@pytest.mark.parametrize("name", ["", "0.", ".0", "0.weight", "1"])
def test_a_name_of_no_linear_is_refused(name):
    refused(nn.Sequential(linear(), nn.ReLU()), name, ["one of ['0']"])
    with pytest.raises(ValueError, match="one of"):
        attach_bcl(linear(), name)


# --- What would never be called --------------------------------------------------------------------------------------


class Mine(nn.MultiheadAttention):
    """A relative."""


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Mine], ids=lambda kind: kind.__name__)
def test_the_output_of_an_attention_is_refused(kind):
    refused(kind(12, 2), "out_proj", ["MultiheadAttention"])
    refused(nn.ModuleDict({"one": kind(12, 2)}), "one.out_proj", ["MultiheadAttention"])


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer], ids=lambda k: k.__name__)
def test_in_a_transformer_only_what_is_called_may_be_attached(kind):
    model = kind(12, 2, 20, dropout=0.0)
    refused(model, "self_attn.out_proj", ["MultiheadAttention"])
    layers = [attach_bcl(model, name).layer for name in ("linear1", "linear2")]
    x = torch.randn(5, 3, 12)
    (model(x) if kind is nn.TransformerEncoderLayer else model(x, x)).square().sum().backward()
    assert [int(layer.step) for layer in layers] == [1, 1]


def swin():
    models = pytest.importorskip("torchvision.models.swin_transformer")
    return models.ShiftedWindowAttention(12, [2, 2], [0, 0], 2), torch.randn(1, 4, 4, 12)


def shared():
    """Two modules hold the layer, and one of them reads it."""
    attention = nn.MultiheadAttention(12, 2)
    return nn.ModuleDict({"alone": attention.out_proj, "attention": attention})


def test_a_layer_that_one_of_its_parents_reads_is_refused():
    refused(shared(), "alone", ["MultiheadAttention"])


class Reader(nn.Module):
    """It reads the weight of a layer without calling it, which no list of names can know."""

    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def weight_readers():
    yield "reader", lambda: (Reader(), "inner", (batch(),))
    yield "swin qkv", lambda: (swin()[0], "qkv", (swin()[1],))
    yield "swin proj", lambda: (swin()[0], "proj", (swin()[1],))
    if hasattr(nn, "LinearCrossEntropyLoss"):
        target = torch.zeros(17, dtype=torch.int64)
        yield "loss", lambda: (nn.LinearCrossEntropyLoss(N, D), "linear", (batch(), target))


@pytest.mark.parametrize("build", dict(weight_readers()).values(), ids=dict(weight_readers()))
def test_an_attached_layer_that_is_never_called_is_refused_or_warns_once(build):
    model, name, inputs = build()
    try:
        layer = attach_bcl(model, name).layer
    except (TypeError, ValueError) as error:
        assert f"'{name}'" in str(error) and type(model).__name__ in str(error)
        return
    with pytest.warns(UserWarning, match="(?s)weight.*gradient.*forward") as caught:
        for _ in range(3):
            model(*inputs).square().mean().backward()
    assert len(caught) == 1 and int(layer.step) == 0


def test_a_layer_that_is_placed_and_never_called_warns():
    model = Reader()
    model.inner = make()
    with pytest.warns(UserWarning, match="(?s)weight.*gradient.*forward"):
        step(model, batch())


def retained(model):
    loss = model(batch()).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def checkpointed(model):
    torch.utils.checkpoint.checkpoint(model, batch().requires_grad_(), use_reentrant=True).sum().backward()


def evaluated(model):
    step(model.eval(), batch())


def partly_frozen(model):
    model[0].frozen = True
    step(model, batch())


def compiled(model):
    torch._dynamo.reset()
    step(torch.compile(model, backend="aot_eager"), batch())


def twice(model):
    (model(batch()).sum() + model(batch(seed=2)).sum()).backward()


def empty(model):
    step(model, batch()[:0])


def with_weight_decay(model):
    (model(batch()).square().mean() + model[0].weight.square().sum()).backward()


CALLS = [step, retained, checkpointed, evaluated, partly_frozen, compiled, twice, empty, with_weight_decay]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_layer_that_is_called_warns_of_nothing(call):
    model = nn.Sequential(linear(), nn.Tanh())
    attach_bcl(model, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(model, batch()) if call is step else call(model)
    assert model[0].weight.grad is not None


# --- Several places --------------------------------------------------------------------------------------------------


def containers():
    """One layer under five names: twice in one module, in two parents, and below a module that is there twice."""
    model, inner, block = nn.Module(), linear(), nn.Sequential(nn.Identity())
    block.append(inner)
    model.a = model.b = inner
    model.list, model.dict = nn.ModuleList([nn.ReLU(), inner]), nn.ModuleDict({"x y": inner})
    model.block = model.again = block
    return model, inner


PLACES = ["a", "b", "list.1", "dict.x y", "block.1", "again.1"]


@pytest.mark.parametrize("name", PLACES)
def test_a_layer_in_several_places_is_replaced_in_all_and_put_back(name):
    model, inner = containers()
    places = [n for n, m in model.named_modules(remove_duplicate=False) if m is inner]
    assert places == PLACES
    handle = attach_bcl(model, name)
    assert all(model.get_submodule(place) is handle.layer for place in PLACES)
    assert not any(type(module) is nn.Linear for module in model.modules())
    handle.remove()
    handle.remove()
    assert all(model.get_submodule(place) is inner for place in PLACES)


def test_a_layer_in_two_places_pulls_once_per_backward():
    inner, other = linear(), make(neighborhood_k=8)
    model = nn.ModuleDict({"one": inner, "two": nn.Sequential(inner)})
    layer = attach_bcl(model, "one").layer
    for one, two in ((model["one"], model["two"]), (other, other)):
        (one(batch()).square().sum() + two(batch(seed=2)).square().sum()).backward()
    assert int(layer.step) == 1 and layer.weight.equal(other.weight)


def test_remove_leaves_what_somebody_put_there_since():
    model, inner = containers()
    handle, new = attach_bcl(model, "a"), nn.Linear(N, D)
    model.b = new
    handle.remove()
    assert model.b is new and model.a is inner and model.block[1] is inner


def test_a_layer_beside_a_parameter_list():
    model = nn.Module()
    model.rows, model.inner = nn.ParameterList([torch.ones(2), torch.ones(3)]), nn.ModuleList([linear()])
    with pytest.raises(ValueError, match=r"one of \['inner.0'\], got 'rows.0'"):
        attach_bcl(model, "rows.0")
    assert attach_bcl(model, "inner.0").layer is model.inner[0]


def test_a_layer_of_a_traced_model():
    models = [nn.Sequential(linear(), nn.Tanh()) for _ in range(2)]
    models[0] = torch.fx.symbolic_trace(models[0])
    for model in models:
        attach_bcl(model, "0")
        step(model, batch())
    assert int(models[0].get_submodule("0").step) == 1 and same(state(models[0]), state(models[1]))


@pytest.mark.parametrize("space", ["weight", "offset"])
def test_a_weight_tied_to_an_embedding_stays_tied(space):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(D, N), nn.Linear(N, D)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    start = embedding.weight.detach().clone()
    handle = attach_bcl(model, "1", som_space=space, som_lr=0.1)
    assert handle.layer.weight is embedding.weight and len(list(model.parameters())) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, torch.arange(D))
    assert int(handle.layer.step) == 1 and embedding.weight.equal(start) == (space == "offset")
    twin = [nn.Parameter(start.clone()) for _ in range(2)]  # what reaches each of the two
    layer = make(neighborhood_k=8, som_space=space)
    layer.weight, layer.bias = twin[1], copy.deepcopy(head.bias)
    step(lambda x: layer(nn.functional.embedding(x, twin[0])), torch.arange(D))
    torch.testing.assert_close(embedding.weight.grad, twin[0].grad + twin[1].grad)
    if space == "weight":  # an offset would be added to the embedding too
        handle.remove()
        assert head.weight is embedding.weight and model[1] is head
