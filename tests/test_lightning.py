"""BCLLayer in a Lightning program: every run gives the bits of the same loop written in plain torch."""

import copy

import pytest
import torch
from helpers.layers import D, N, same, state
from helpers.training import DATA, OPTIMIZERS, OPTIONS, bind_all, optimizers, windows
from torch import nn
from torch.nn import functional as F

from bcl_fast.layer import BCLLayer

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:(`training_step` returned `None`|`isinstance.treespec, LeafSpec)")

binds = pytest.mark.parametrize("bind", ["configure_optimizers", "on_train_start"])


def network(layers=1):
    torch.manual_seed(0)
    widths = [N, D, 9][: layers + 1]
    parts = [part for i in range(layers) for part in (BCLLayer(*widths[i : i + 2], **OPTIONS), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 5))


def plain(optimizer="sgd", *, bound=True, epochs=2, window=1, clip=None, bf16=False, layers=1, skip=lambda i: False):
    """The loop that every Lightning run below must equal; returns the model's final state."""
    model = network(layers)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    if bound:
        bind_all(model, optimizer)
    for _ in range(epochs):
        for i, (x, y) in enumerate(DATA):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x), y)
            if i % window == 0:
                optimizer.zero_grad()
            (loss / window).backward()
            if (i + 1) % window == 0 or i + 1 == len(DATA):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                if not skip(i):
                    optimizer.step()
    return state(model)


class Module(lightning.LightningModule):
    """The network with one optimizer, which its layers are bound to where `bind` says."""

    def __init__(self, optimizer="sgd", bind=None, layers=1):
        super().__init__()
        self.network, self.optimizer, self.bind = network(layers), optimizer, bind

    def training_step(self, item):
        x, y = item
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        make = OPTIMIZERS.get(self.optimizer, self.optimizer)
        optimizer = make(self.parameters())
        if self.bind == "configure_optimizers":
            bind_all(self, optimizer)
        return optimizer

    def on_train_start(self):
        if self.bind == "on_train_start":
            bind_all(self, self.optimizers())  # Lightning's own wrapper


def loader(batches=None):
    return torch.utils.data.DataLoader(DATA[:batches], batch_size=None)  # a list would be a list of loaders


def trainer(epochs=2, **arguments):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return lightning.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, **quiet, **arguments)


def fit(module, epochs=2, validation=None, checkpoint=None, **arguments):
    """Train and return the final state of the network."""
    trainer(epochs, **arguments).fit(module, loader(), validation, ckpt_path=checkpoint)
    return state(module.network)


# --- Automatic optimization: optimizer.step(closure) ----------------------------------------------------------------


@optimizers
@windows
@binds
def test_bound(optimizer, window, bind):
    assert same(fit(Module(optimizer, bind), accumulate_grad_batches=window), plain(optimizer, window=window))


@optimizers
@windows
def test_unbound(optimizer, window):
    got = fit(Module(optimizer), accumulate_grad_batches=window)
    assert same(got, plain(optimizer, window=window, bound=False))


@windows
def test_bound_with_clipped_gradients(window):
    got = fit(Module(bind="configure_optimizers"), accumulate_grad_batches=window, gradient_clip_val=0.05)
    assert same(got, plain(window=window, clip=0.05))
    assert not same(got, plain(window=window)), "nothing was clipped"


@optimizers
@windows
@pytest.mark.parametrize("bind", [None, "configure_optimizers"])
def test_bf16_mixed(optimizer, window, bind):
    got = fit(Module(optimizer, bind), accumulate_grad_batches=window, precision="bf16-mixed")
    assert same(got, plain(optimizer, bound=bind is not None, window=window, bf16=True))


@windows
def test_two_bound_layers(window):
    got = fit(Module("adamw", "configure_optimizers", layers=2), accumulate_grad_batches=window)
    assert same(got, plain("adamw", window=window, layers=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GPU")
@windows
@binds
def test_half_mixed_precision_with_its_scaler(bind, window):
    """The plain loop with a GradScaler, on the device for which Lightning has one."""
    module = Module(bind=bind)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    fitted = lightning.Trainer(
        accelerator="gpu", devices=1, max_epochs=2, precision="16-mixed", accumulate_grad_batches=window, **quiet
    )
    fitted.fit(module, loader())
    model, scaler = network().cuda(), torch.amp.GradScaler("cuda")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bind_all(model, optimizer)
    for _ in range(2):
        for i, (x, y) in enumerate(DATA):
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(x.cuda()), y.cuda())
            if i % window == 0:
                optimizer.zero_grad()
            scaler.scale(loss / window).backward()
            if (i + 1) % window == 0 or i + 1 == len(DATA):
                scaler.step(optimizer)
                scaler.update()
    assert same(state(module.network.cuda()), state(model))


def test_last_pull_is_not_left_over_and_none_is_late():
    """One batch, one step: all of the pull is in the weight when it returns."""
    module = Module(bind="configure_optimizers")
    trainer(1, limit_train_batches=1).fit(module, loader())
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bind_all(model, optimizer)
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    optimizer.step()
    assert same(state(module.network), state(model)) and module.network[0]._pulls.idle


def test_the_pull_is_off_while_frozen_and_returns():
    class Freezes(Module):
        def on_train_epoch_start(self):
            self.network[0].frozen = self.current_epoch == 1

    got, model = fit(Freezes(bind="configure_optimizers"), epochs=3), network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bind_all(model, optimizer)
    for epoch in range(3):
        model[0].frozen = epoch == 1
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert same(got, state(model))


# --- Steps that do not come -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", [None, "configure_optimizers"])
def test_a_skipped_step_takes_its_pulls_along(bind):
    """A closure called by itself, as Lightning's documentation does: its gradients are dropped by the next one."""

    class Skips(Module):
        def optimizer_step(self, epoch, index, optimizer, closure):
            if index % 3 == 1:
                closure()
            else:
                optimizer.step(closure=closure)

    assert same(fit(Skips(bind=bind)), plain(bound=bind is not None, skip=lambda i: i % 3 == 1))


@pytest.mark.parametrize("bind", [None, "configure_optimizers"])
def test_a_batch_without_a_loss_neither_pulls_nor_repeats_a_pull(bind):
    class Picks(Module):
        def training_step(self, item, index):
            return None if index in (1, 4) else super().training_step(item)

    got, model = fit(Picks(bind=bind)), network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    if bind:
        bind_all(model, optimizer)
    for _ in range(2):
        for i, (x, y) in enumerate(DATA):
            optimizer.zero_grad()
            if i not in (1, 4):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert same(got, state(model))


@windows
@pytest.mark.parametrize("bind", [None, "configure_optimizers"])
def test_validation_in_between_changes_nothing(window, bind):
    class Validates(Module):
        def validation_step(self, item):
            assert not self.network.training
            self.validated = getattr(self, "validated", 0) + 1
            return F.cross_entropy(self.network(item[0]), item[1])

    module = Validates(bind=bind)
    got = fit(module, validation=loader(2), accumulate_grad_batches=window, val_check_interval=3)
    assert module.validated > 4
    assert same(got, plain(bound=bind is not None, window=window))


# --- Manual optimization --------------------------------------------------------------------------------------------


@windows
@pytest.mark.parametrize("bind", [None, "configure_optimizers", "on_train_start"])
def test_manual_optimization(window, bind):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, item, index):
            optimizer, loss = self.optimizers(), super().training_step(item)
            if index % window == 0:
                optimizer.zero_grad()
            self.manual_backward(loss / window)
            if (index + 1) % window == 0 or index + 1 == len(DATA):
                optimizer.step()

    assert same(fit(Manual(bind=bind)), plain(bound=bind is not None, window=window))


@binds
def test_manual_optimization_with_a_closure(bind):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, item):
            optimizer = self.optimizers()

            def closure():
                loss = Module.training_step(self, item)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    assert same(fit(Manual(bind=bind)), plain())


# --- Resuming -------------------------------------------------------------------------------------------------------


@windows
@pytest.mark.parametrize("bind", [None, "configure_optimizers", "on_train_start"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, window, bind):
    path, first = tmp_path / "run.ckpt", Module(bind=bind)
    half = trainer(1, accumulate_grad_batches=window)
    half.fit(first, loader())
    half.save_checkpoint(path)
    resumed = Module(bind=bind)
    with torch.no_grad():
        for tensor in resumed.state_dict().values():
            tensor.zero_()
    got = fit(resumed, 3, checkpoint=path, accumulate_grad_batches=window)
    assert same(got, plain(bound=bind is not None, epochs=3, window=window))


def test_resumed_from_the_middle_of_an_epoch(tmp_path):
    """A checkpoint of every third step, as `every_n_train_steps` writes it: nothing pending is missing in it."""

    class Saves(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, item, index):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    fit(Module(bind="configure_optimizers"), 1, callbacks=[Saves()])
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    model = network()
    model.load_state_dict({name.removeprefix("network."): value for name, value in saved["state_dict"].items()})
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer_states"][0]))
    bind_all(model, optimizer)
    for x, y in DATA[3:]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert same(state(model), plain(epochs=1))


# --- An optimizer that evaluates its closure several times a step ---------------------------------------------------


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@binds
def test_lbfgs_pulls_once_after_its_step_with_the_mean_of_its_evaluations(search, bind):
    """The function that a line search evaluates must not move under it."""

    def make(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4, line_search_fn=search)

    got, model = fit(Module(make, bind)), network()
    optimizer = make(model.parameters())
    puller = torch.optim.SGD(model.parameters(), lr=0.0)  # its step adds the mean of the pulls, and no more
    bind_all(model, puller)
    evaluations = []
    for _ in range(2):
        for x, y in DATA:

            def closure(x=x, y=y):
                loss = F.cross_entropy(model(x), y)
                gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                loss.backward()  # gradients that are thrown away would take the pulls of the evaluation before along
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                evaluations.append(loss)
                return loss

            optimizer.step(closure)
            puller.step()
    assert len(evaluations) > 2 * 2 * len(DATA)
    assert same(got, state(model))
