"""Hooks and attributes of a layer go along when it is exchanged, or are refused by name."""

import pytest
import torch
from helpers.layers import D, N, batch, same, state
from torch import nn

from bcl_fast import BCLLayer, attach_bcl, detach_bcl


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(N, D)


def step(model, x):
    model(x).square().mean().backward()


def doubled(self, input):
    return nn.Linear.__call__(self, input) * 2


OWN = {
    "__call__": doubled,
    "_save_to_state_dict": lambda self, *args: None,
    "get_extra_state": lambda self: {"version": 1},
}


@pytest.mark.parametrize("name", OWN)
def test_methods_that_no_other_layer_has_are_refused(name):
    model, kept = (nn.Sequential(type("Own", (kind,), {name: OWN[name]})(N, D)) for kind in (nn.Linear, BCLLayer))
    for exchange in (lambda: attach_bcl(model, "0"), lambda: detach_bcl(kept)):
        with pytest.raises(ValueError, match=f"'0' is a Own with a {name} of its own"):
            exchange()


class Gained(nn.Module):
    """Reads attributes of its layer, as those of an initialization or of groups of parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(N, D)
        self.layer.gain, self.layer.notes = 2.0, ["shared"]

    def forward(self, x):
        return self.layer(x) * getattr(self.layer, "gain", 1.0)


def test_attributes_go_along_and_back():
    model = Gained().eval()
    linear, expected = model.layer, model(batch())
    linear.compile(backend="eager")  # which calls this very object
    handle = attach_bcl(model, "layer")
    assert model(batch()).equal(expected) and model.layer.notes is linear.notes
    model.layer.late = 3
    handle.remove()
    assert model(batch()).equal(expected) and model.layer is linear and linear.late == 3
    attach_bcl(model, "layer")
    assert detach_bcl(model) == ["layer"]
    assert model(batch()).equal(expected)
    assert set(vars(model.layer)) == set(vars(linear)) - {"_compiled_call_impl"}


@pytest.mark.parametrize("name", ["frozen", "config", "_pulls"])
def test_attributes_that_mean_something_else_on_a_layer_are_refused(name):
    model = Gained()
    setattr(model.layer, name, 1)
    with pytest.raises(ValueError, match=f"'layer' has attributes '{name}', which mean something else on a BCLLayer"):
        attach_bcl(model, "layer")
    assert type(model.layer) is nn.Linear


# --- Hooks -----------------------------------------------------------------------------------------------------------


class Log(list):
    """Registers one hook of every kind, each of which notes its name and the module that it was called for."""

    def on(self, module):
        def note(name):
            return lambda module, *args: self.append((name, module))

        self.handles = [
            module.register_forward_pre_hook(note("pre")),
            module.register_forward_pre_hook(lambda m, args, kwargs: self.append(("pre with", m)), with_kwargs=True),
            module.register_forward_hook(note("forward")),
            module.register_forward_hook(lambda m, args, kwargs, output: self.append(("with", m)), with_kwargs=True),
            module.register_forward_hook(note("always"), always_call=True),
            module.register_full_backward_pre_hook(note("backward pre")),
            module.register_full_backward_hook(note("backward")),
            module.register_state_dict_pre_hook(note("saves")),
            module.register_state_dict_post_hook(note("saved")),
            module.register_load_state_dict_pre_hook(note("loads")),
            module.register_load_state_dict_post_hook(note("loaded")),
        ]
        return self

    def use(self, model):
        """The names noted by one step, save and load, and whether all were for this module."""
        self.clear()
        step(model, batch().requires_grad_())
        model.load_state_dict(model.state_dict())
        names, modules = zip(*self, strict=True) if self else ((), ())
        return list(names), all(module is model[0] for module in modules)


ORDER = [
    "pre",
    "pre with",
    "forward",
    "with",
    "always",
    "backward pre",
    "backward",
    "saves",
    "saved",
    "loads",
    "loaded",
]


@pytest.mark.parametrize("space", ["weight", "offset"])
def test_hooks_are_carried_over_and_back(space):
    model, log = nn.Sequential(linear(), nn.Tanh()), Log()
    log.on(model[0])
    assert log.use(model) == (ORDER, True)
    handle = attach_bcl(model, "0", som_space=space)
    assert log.use(model) == (ORDER, True) and isinstance(model[0], BCLLayer)
    late = model[0].register_forward_hook(lambda *args: log.append(("late", model[0])))
    handle.remove()
    names, right = log.use(model)
    assert right and [name for name in names if name != "late"] == ORDER and "late" in names
    late.remove()
    for each in log.handles:
        each.remove()
    assert log.use(model) == ([], True)
    assert not model[0]._forward_pre_hooks and not model[0]._forward_hooks


def test_the_handle_of_a_carried_hook_removes_it():
    model, log = nn.Sequential(linear(), nn.Tanh()), Log()
    log.on(model[0])
    handle = attach_bcl(model, "0")
    for each in log.handles:
        each.remove()
    assert log.use(model) == ([], True)
    handle.remove()
    assert log.use(model) == ([], True)


def test_hooks_that_change_what_they_see():
    models = [nn.Sequential(linear(), nn.Tanh()) for _ in range(2)]
    models[0][0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    models[0][0].register_forward_hook(lambda module, args, output: output + 1)
    for model in models:
        attach_bcl(model, "0")
    outputs = models[0](batch()), torch.tanh(models[1][0](2 * batch()) + 1)
    assert outputs[0].equal(outputs[1])
    for output in outputs:
        output.sum().backward()
    assert same(state(models[0]), state(models[1]))


def test_hooks_of_the_parameters_stay():
    model, seen = nn.Sequential(linear()), []
    model[0].weight.register_hook(lambda gradient: seen.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda weight: seen.append("accumulated"))
    handle = attach_bcl(model, "0")
    step(model, batch())
    handle.remove()
    step(model, batch())
    assert seen == ["gradient", "accumulated"] * 2
