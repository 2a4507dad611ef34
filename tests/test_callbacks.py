"""The callbacks of bcl_fast.integrations: the bits of a plain loop that binds, and its numbers in each logger."""

import csv
import warnings

import pytest
import torch
from helpers.layers import same, state
from helpers.training import DATA, OPTIMIZERS, OPTIONS, SAMPLES, bind_all, network, train, windows
from torch.nn import functional as F

from bcl_fast.layer import BCLLayer
from bcl_fast.meter import Meter
from bcl_fast.monitor import Monitored

LAYER = "network.1"


def looped(model, optimizer="sgd", *, parts, epochs=2, bf16=False, clip=None, every=2):
    """The plain loop, an optimizer step for each number of batches in `parts`, and what a Meter around it measured."""
    optimizer, found = OPTIMIZERS[optimizer](model.parameters()), []
    bind_all(model, optimizer)
    with Meter(model, optimizer, every, found.append):
        for _ in range(epochs):
            start = 0
            for part in parts:
                data = DATA[start : start + part]
                train(model, optimizer, data=data, window=part, bf16=bf16, clip=clip)
                start += part
    return state(model), found


def parts_of(window):
    return [min(window, len(DATA) - start) for start in range(0, len(DATA), window)]


precisions = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])


# --- Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning():
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, optimizer="sgd", network=None):
            super().__init__()
            self.network, self.optimizer = network, optimizer

        def training_step(self, item):
            return F.cross_entropy(self.network(item[0]), item[1])

        def configure_optimizers(self):
            return OPTIMIZERS[self.optimizer](self.parameters())

    lightning.Module = Module
    return lightning


def fit(lightning, module, callback, path, epochs=2, **arguments):
    """Train under the callback; the rows that Lightning's own logger has written to a file."""
    logger = lightning.loggers.CSVLogger(path, name="", version="")
    callbacks = callback if isinstance(callback, list) else [callback]
    quiet = dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=logger, callbacks=callbacks, **quiet, **arguments
    )
    trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
    logger.finalize("success")
    file = path / "metrics.csv"
    return [row for row in csv.DictReader(file.open()) if row.get(f"bcl/{LAYER}/wt_sim")] if file.exists() else []


quiet_lightning = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec", "ignore:The 'train_dataloader'")


@quiet_lightning
@windows
@precisions
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lightning_binds_and_logs(lightning, optimizer, bf16, window, tmp_path):
    from bcl_fast.integrations.lightning import BCLCallback

    module = lightning.Module(optimizer, network())
    precision = dict(precision="bf16-mixed") if bf16 else {}
    arguments = dict(accumulate_grad_batches=window, log_every_n_steps=1, **precision)
    rows = fit(lightning, module, BCLCallback(every=2, out=tmp_path / "out"), tmp_path, **arguments)
    # Lightning divides by the size of a whole window, also in its last and smaller one.
    model, found = network(), []
    stepper = OPTIMIZERS[optimizer](model.parameters())
    bind_all(model, stepper)
    with Meter(model, stepper, 2, found.append):
        train(model, stepper, window=window, bf16=bf16, epochs=2)
    assert same(state(module.network), state(model))
    assert [int(row["step"]) for row in rows] == list(range(0, 2 * len(parts_of(window)), 2))
    for row, one in zip(rows, found, strict=True):
        assert {name: float(row[f"bcl/{LAYER}/{name}"]) for name in one.metrics} == pytest.approx(
            one.metrics, nan_ok=True
        )
    lines = Monitored.read(tmp_path / "out").layers[LAYER]
    assert [line["step"] for line in lines] == [one.step for one in found]
    assert module.network[1]._observers == ()


@quiet_lightning
def test_lightning_binds_alone_where_nothing_is_logged_and_leaves_after_an_error(lightning, tmp_path):
    from bcl_fast.integrations.lightning import BCLCallback

    module = lightning.Module("sgd", network())
    assert fit(lightning, module, BCLCallback(every=0), tmp_path / "one") == []
    assert same(state(module.network), train(network(), epochs=2))
    assert module.network[1].bound_optimizer is not None

    class Fails(lightning.Module):
        def training_step(self, item, index):
            if index == self.last:
                raise ZeroDivisionError
            return super().training_step(item)

    for Fails.last in (0, 3):
        module = Fails("sgd", network())
        with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
            warnings.filterwarnings("error", message="Monitor has measured no step")
            fit(lightning, module, BCLCallback(every=1), tmp_path / f"{Fails.last}")
        assert module.network[1]._observers == ()


@quiet_lightning
@pytest.mark.parametrize("others", [0, 1])
def test_lightning_binds_what_its_optimizer_gets_later(lightning, others, tmp_path):
    """As BaseFinetuning unfreezes a part of the model; the loop that binds that before the same step trains alike."""
    from bcl_fast.integrations.lightning import BCLCallback

    class Later(lightning.callbacks.BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.network[1], train_bn=False)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.network[1], optimizer, lr=0.1)

    module, twin = (lightning.Module("sgd", network()) for _ in range(2))
    for each in (module, twin):
        each.network.extend(BCLLayer(5, 5, **OPTIONS) for _ in range(others))
    twin.load_state_dict(module.state_dict())
    module.configure_optimizers = lambda: OPTIMIZERS["sgd"]([p for p in module.parameters() if p.requires_grad])
    arguments = dict(accumulate_grad_batches=4, log_every_n_steps=1)
    callback = BCLCallback(every=1, out=tmp_path / "out")
    rows = fit(lightning, module, [callback, Later()], tmp_path, **arguments)
    twin.network[1].requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"]([p for p in twin.parameters() if p.requires_grad])
    for layer in twin.network[4:]:
        layer.bind_optimizer(optimizer)
    train(twin.network, optimizer, bound=False, window=4)
    twin.network[1].requires_grad_(True)
    optimizer.add_param_group({"params": twin.network[1].parameters(), "lr": 0.1})
    train(twin.network, optimizer, window=4)
    assert same(state(module.network), state(twin.network))
    assert [float(row[f"bcl/{LAYER}/adam"]) > 0 for row in rows] == [True] * 2


@quiet_lightning
def test_lightning_averages_what_trains_on(lightning, tmp_path):
    """EMAWeightAveraging averages buffers too, whose neighbors are then none: its checkpoint loads, and trains."""
    from bcl_fast.integrations.lightning import BCLCallback

    averaging = getattr(lightning.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("this version of Lightning has no EMAWeightAveraging")
    module = lightning.Module("sgd", network(recompute_every=1))
    fit(lightning, module, [BCLCallback(every=0), averaging(decay=0.9)], tmp_path / "one", epochs=3)
    averaged, fresh = state(module.network), network(seed=3, recompute_every=1)
    with pytest.warns(UserWarning, match="neighbors must be.* the competition starts afresh"):
        fresh.load_state_dict(averaged)
    assert int(fresh[1].step) == 0 and fresh[1].weight.equal(averaged["1.weight"])
    with pytest.warns(UserWarning, match="neighbors must be.* the competition starts afresh"):
        fit(lightning, module, BCLCallback(every=0), tmp_path / "two", epochs=1)
    assert same(state(module.network), train(fresh))


@quiet_lightning
def test_lightning_names_layers_that_no_optimizer_holds(lightning, tmp_path):
    from bcl_fast.integrations.lightning import BCLCallback

    module = lightning.Module("sgd", network().append(BCLLayer(5, 5, **OPTIONS)))
    module.configure_optimizers = lambda: OPTIMIZERS["sgd"](module.network[1].parameters())
    with pytest.warns(UserWarning, match="no optimizer holds the weights of 'network.4': every backward pulls them"):
        fit(lightning, module, BCLCallback(every=0), tmp_path, epochs=1)
    for arguments, message in (
        (dict(every=-1), "every must be an integer >= 0, got -1"),
        (dict(every=0, out="here"), "out needs steps that are measured, every >= 1, got 'here' with every=0"),
    ):
        with pytest.raises(ValueError, match=message):
            BCLCallback(**arguments)


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    transformers.logging.set_verbosity_error()

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self):
            super().__init__(transformers.PretrainedConfig())
            self.network = network()
            self.post_init()

        def forward(self, x, labels=None):
            logits = self.network(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *arguments):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    transformers.Model, transformers.InOrder = Model, InOrder
    return transformers


def trainer_of(hf, model, path, window=1, bf16=False, **arguments):
    samples = [{"x": x, "labels": label} for xs, ys in DATA for x, label in zip(xs, ys, strict=True)]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    options = dict(
        num_train_epochs=2,
        per_device_train_batch_size=SAMPLES[0],
        use_cpu=True,
        bf16=bf16,
        gradient_accumulation_steps=window,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    return hf.InOrder(
        model,
        hf.TrainingArguments(str(path), **options | arguments),
        train_dataset=samples,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )


@windows
@precisions
def test_transformers_binds_and_logs(hf, bf16, window, tmp_path):
    from bcl_fast.integrations.transformers import BCLCallback

    model, twin = hf.Model(), hf.Model()
    twin.load_state_dict(model.state_dict())
    trainer = trainer_of(hf, model, tmp_path, window, bf16)
    trainer.add_callback(BCLCallback(trainer, every=2, out=tmp_path / "out"))
    trainer.train()
    expected, found = looped(twin.network, parts=parts_of(window), bf16=bf16)
    assert same(state(model.network), expected)
    history = trainer.state.log_history
    rows = [row for row in history if f"bcl/{LAYER}/wt_sim" in row]
    steps = 2 * len(parts_of(window))
    assert [row["step"] for row in rows] == list(range(1, steps + 1, 2))
    for row, one in zip(rows, found, strict=True):
        assert {name: row[f"bcl/{LAYER}/{name}"] for name in one.metrics} == pytest.approx(one.metrics, nan_ok=True)
    assert [row["step"] for row in history if "loss" in row] == list(range(1, steps + 1)), "its own log is lost"
    assert [line["step"] for line in Monitored.read(tmp_path / "out").layers[LAYER]] == [one.step for one in found]
    assert model.network[1]._observers == ()


def test_transformers_reports_to_tensorboard_and_trains_again(hf, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [demo]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from bcl_fast.integrations.transformers import BCLCallback

    model = hf.Model()
    trainer = trainer_of(hf, model, tmp_path, report_to=["tensorboard"], max_steps=3, num_train_epochs=1)
    trainer.add_callback(BCLCallback(trainer, every=2))
    trainer.train()
    folder = next(tmp_path.rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars(f"train/bcl/{LAYER}/wt_sim")] == [1, 3]
    trainer.train()
    assert int(model.network[1].step) == 6 and model.network[1]._observers == ()

    def fails(*_):
        if int(model.network[1].step) == 8:
            raise ZeroDivisionError

    handle = model.network.register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    handle.remove()
    trainer.train()  # as if nothing had been
    assert int(model.network[1].step) == 11 and model.network[1]._observers == ()
    measured = [row["step"] for row in trainer.state.log_history if f"bcl/{LAYER}/wt_sim" in row]
    assert measured == [1, 3]
