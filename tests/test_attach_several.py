"""attach_bcl on several layers of a model at once: all of them, in the model's order, or none and one error."""

import pytest
import torch
from helpers.layers import D, N, batch, make, same, state
from helpers.models import deep
from helpers.training import DATA, OPTIONS, network, train
from torch import nn
from torch.nn.utils import parametrizations

from bcl_fast import BCLLayer, attach_bcl

NAMES = ["0", "1.1", "3", "5"]
WAYS = {
    "names": ["0", "1.1", "3", "5"],
    "in another order": ["5", "3", "0", "1.1"],
    "a generator": (name for name in reversed(NAMES)),
    "a set": set(NAMES),
    "both names of one": ["4", "5", "1.1", "3", "0"],
    "all": lambda name, linear: True,
    "of a predicate": lambda name, linear: type(linear) is nn.Linear and name != "0" and linear.in_features in (N, D),
}


@pytest.mark.parametrize("way", WAYS)
def test_several_layers_are_attached_in_the_order_of_the_model(way):
    model, twin = deep(), deep()
    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handle = attach_bcl(model, WAYS[way], **OPTIONS)
    # The predicate above takes the first layer under its second name alone, which comes after two others.
    assert list(handle.layers) == (NAMES if way != "of a predicate" else ["1.1", "3", "4", "5"])
    assert model[0] is model[4] and all(model.get_submodule(n) is layer for n, layer in handle.layers.items())
    assert all(isinstance(model.get_submodule(name), BCLLayer) for name in NAMES)
    twin[1][1], twin[3], twin[5] = (BCLLayer.from_linear(twin.get_submodule(n), **OPTIONS) for n in ("1.1", "3", "5"))
    twin[0] = twin[4] = BCLLayer.from_linear(twin[0], **OPTIONS)
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for x, _ in DATA:
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(state(model), state(twin))
    before = state(model)
    for _ in range(2):
        handle.remove()
        assert {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)} == plain
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


def test_a_parent_that_takes_no_attributes_stops_nothing_half_way():
    class Sealed(nn.Sequential):
        def __setattr__(self, name, value):
            raise AttributeError("sealed") if "_modules" in self.__dict__ and name in self._modules else None

    model = nn.Sequential(nn.Linear(N, N), Sealed(nn.Linear(N, D)))
    model[1].__dict__["training"], expected = True, model(batch())
    handle = attach_bcl(model, lambda name, linear: True)
    assert [type(model[0]), type(model[1][0])] == [BCLLayer] * 2 == [type(each) for each in handle.layers.values()]
    assert model(batch()).equal(expected)
    handle.remove()
    assert [type(model[0]), type(model[1][0])] == [nn.Linear] * 2


def test_the_layer_of_a_handle_is_its_only_one():
    model = deep()
    assert attach_bcl(model, "4").layer is model[0]  # and under the name that was given
    assert attach_bcl(model, ["3"]).layer is model[3]
    handle = attach_bcl(model, ["1.1", "5"])
    with pytest.raises(ValueError, match="single attached layer, got '1.1', '5'"):
        handle.layer  # noqa: B018


# Argument `name`, further arguments, the error and what it says.
WRONG = {
    "unknown": (["0", "one", "1"], {}, ValueError, r"one of \['0', '1.1', '3', '4', '5'\], got 'one', '1'$"),
    "twice": (["0", "3", "0"], {}, ValueError, "each name once, got '0'"),
    "nothing": ([], {}, ValueError, r"choose .* of \['0', .*got \[\]: none"),
    "a predicate of nothing": (lambda name, linear: False, {}, ValueError, "got <function .*none"),
    "no bool": (lambda name, linear: linear.bias, {}, TypeError, "returns True or False, got .* for '0'"),
    "None": (lambda name, linear: None, {}, TypeError, "returns True or False, got None for '0'"),
    "no str": (["0", 3], {}, TypeError, "name must be a str, several, or a predicate.*got 3 among"),
    "a number": (3, {}, TypeError, "name must be a str, several, or a predicate.*got 3"),
    "a module": (nn.Linear(N, D), {}, TypeError, "name must be a str, several, or a predicate.*got Linear"),
    "a class": (nn.Linear, {}, TypeError, "name must be a str, several, or a predicate.*got <class"),
    "no option": (["0", "3"], dict(rescue=3), TypeError, "rescue"),
    "a wrong option": (["0", "3"], dict(rescue_k=-1), ValueError, "^rescue_k must be .*got -1"),
    "a wrong backend": (["0", "3"], dict(backend="gpu"), ValueError, "^backend must be .*got 'gpu'"),
    "a wrong config": (["0", "3"], dict(config="hard-rank"), TypeError, "^config must be"),
    "a device": (["0", "3"], dict(device="cpu"), TypeError, "device"),
}


def untouched(model, before, hooks):
    return (
        dict(model.named_modules(remove_duplicate=False)) == before
        and {name: dict(p._post_accumulate_grad_hooks or {}) for name, p in model.named_parameters()} == hooks
    )


def structure(model):
    """Every module under all of its names, and the hooks of every parameter."""
    hooks = {name: dict(p._post_accumulate_grad_hooks or {}) for name, p in model.named_parameters()}
    return dict(model.named_modules(remove_duplicate=False)), hooks


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_argument_is_named_and_changes_nothing(how):
    name, arguments, error, message = WRONG[how]
    model = deep()
    before = structure(model)
    with pytest.raises(error, match=f"(?s){message}"):
        attach_bcl(model, name, **arguments)
    assert untouched(model, *before)


class Adapted(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, input):
        return 2 * super().forward(input)


def zoo():
    """What may be attached, and one of everything that may not."""
    model = nn.ModuleDict({"good": nn.Linear(N, D), "attention": nn.MultiheadAttention(12, 2), "one": nn.Linear(N, 1)})
    model["adapted"], model["normed"] = Adapted(N, D), parametrizations.weight_norm(nn.Linear(N, D))
    model["lazy"], model["bcl"], model["fine"] = nn.LazyLinear(D), make(), nn.Linear(D, N)
    model["compiled"], model["complex"] = torch.compile(nn.Linear(N, D)), nn.Linear(N, D, dtype=torch.complex64)
    model["more"] = nn.Linear(N, D)
    model["more"].inner = nn.Linear(N, D)
    return model


REFUSED = {
    "attention.out_proj": "belongs to a MultiheadAttention, which reads its weight and never calls it",
    "one": "cannot compete: out_features must .*got 1",
    "adapted": "is a Adapted with a forward of its own",
    "normed": "is parametrized",
    "lazy": "is a LazyLinear without a weight",
    "bcl": "is a BCLLayer already",
    "compiled._orig_mod": "is compiled by itself",
    "complex": "cannot compete: dtype must .*complex64",
    "more": "holds 'inner', which would be lost",
}


def test_one_error_has_everything_that_is_refused():
    model = zoo()
    before = structure(model)
    with pytest.raises(ValueError) as error:
        attach_bcl(model, lambda name, linear: True)
    assert untouched(model, *before)
    says = dict(part.split("' ", 1) for part in str(error.value).partition("but '")[2].split("; '"))
    assert says.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError, match=f"but '{name}' {reason}") as alone:
            attach_bcl(model, name)
        assert str(alone.value).endswith(says[name])
    with pytest.raises(ValueError, match="got 'two', and be .* but 'one' cannot compete"):
        attach_bcl(model, ["good", "one", "two"])
    assert untouched(model, *before)
    handle = attach_bcl(model, lambda name, linear: name not in REFUSED)
    assert list(handle.layers) == ["good", "fine", "more.inner"]


def test_a_layer_that_torch_compile_holds_is_refused_since_it_would_go_on():
    compiled = torch.compile(nn.Linear(N, D), backend="eager")
    for name in ("_orig_mod", lambda name, linear: True):
        with pytest.raises(ValueError, match="'_orig_mod' is compiled by itself"):
            attach_bcl(compiled, name)


def test_a_compiled_model_trains_what_is_attached_to_it():
    torch._dynamo.reset()
    model, twin = network(plain=True), network(plain=True)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch()).sum().backward()
    model.zero_grad()
    handle = attach_bcl(compiled, "_orig_mod.1", **OPTIONS)
    attach_bcl(twin, "1", **OPTIONS)
    train(compiled)
    assert same(state(model), train(twin)) and int(handle.layer.step) == len(DATA)
