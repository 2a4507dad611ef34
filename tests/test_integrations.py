"""BCLLayer under transformers, accelerate and peft: the bits of the same loop in plain torch."""

import copy

import pytest
import torch
from helpers.layers import same, state
from helpers.training import (
    DATA,
    OPTIMIZERS,
    OPTIONS,
    SAMPLES,
    bind_all,
    bind_wrapped,
    may_start_afresh,
    network,
    train,
)
from torch import nn
from torch.nn import functional as F

from bcl_fast.attach import attach_bcl
from bcl_fast.layer import BCLLayer

# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    """transformers, with a model class of the network above in it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    class Config(transformers.PretrainedConfig):
        model_type = "bcl_fast_test"

        def __init__(self, plain=False, som_space="weight", **rest):
            self.plain, self.som_space = plain, som_space
            super().__init__(**rest)

    class Model(transformers.PreTrainedModel):
        config_class = Config
        supports_gradient_checkpointing = True

        def __init__(self, config):
            super().__init__(config)
            self.network = network(config.plain, **({} if config.plain else dict(som_space=config.som_space)))
            self.gradient_checkpointing = False
            self.post_init()

        def forward(self, x, labels=None):
            first, *rest = self.network
            hidden = first(x)
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(nn.Sequential(*rest).__call__, hidden)
            else:
                hidden = nn.Sequential(*rest)(hidden)
            return hidden if labels is None else {"loss": F.cross_entropy(hidden, labels), "logits": hidden}

    Model.transformers, Model.config_class = transformers, Config
    return Model


def hf_pair(hf, **options):
    """A transformers model, and a plain one of the same weights."""
    model = hf(hf.config_class(**options))
    twin = network(som_space=options.get("som_space", "weight"))
    twin.load_state_dict(model.network.state_dict())
    return model, twin


def saved(hf, path, steps=6, **options):
    """A transformers model saved after some steps, and a plain model in the same state."""
    model, twin = hf_pair(hf, **options)
    assert same(train(model.network, data=DATA[:steps]), train(twin, data=DATA[:steps]))
    model.save_pretrained(path)
    return twin


@pytest.mark.parametrize("steps", [0, 4, 6], ids="{} steps".format)  # 4: a refresh is due
def test_saved_and_loaded_pretrained_model_continues(hf, tmp_path, memory, recwarn, steps):
    for som_space in ("weight", "offset"):
        twin = saved(hf, tmp_path, steps, som_space=som_space)
        model = hf.from_pretrained(tmp_path)
        assert same(state(model.network), state(twin))
        assert model.network.eval()(DATA[0][0]).equal(twin.eval()(DATA[0][0]))
        recwarn.clear()
        assert same(train(model.network, "adamw"), train(twin, "adamw"))
        assert not [str(w.message) for w in recwarn if "neighbors" in str(w.message) or "step" in str(w.message)]
        assert model.network[1].backend == twin[1].backend


@may_start_afresh
@pytest.mark.parametrize("som_space", ["weight", "offset"])
def test_pretrained_checkpoint_of_a_plain_model_starts_afresh(hf, tmp_path, memory, som_space):
    plain = hf(hf.config_class(plain=True))
    plain.save_pretrained(tmp_path)
    model = hf.from_pretrained(tmp_path, config=hf.config_class(som_space=som_space))
    twin = plain.network
    twin[1] = BCLLayer.from_linear(twin[1], **OPTIONS, som_space=som_space)
    assert model.eval()(DATA[0][0]).isfinite().all()
    assert same(train(model.network), train(twin))


def test_attached_to_a_pretrained_model_and_saved_from_there(hf, tmp_path, memory):
    plain = hf(hf.config_class(plain=True))
    plain.save_pretrained(tmp_path / "plain")
    model = hf.from_pretrained(tmp_path / "plain")
    handle, twin = attach_bcl(model, "network.1", **OPTIONS), plain.network
    twin[1] = BCLLayer.from_linear(twin[1], **OPTIONS)
    assert same(train(model.network), train(twin))
    model.config.plain = False
    model.save_pretrained(tmp_path / "trained")
    loaded = hf.from_pretrained(tmp_path / "trained")
    assert loaded.network[1].som_lr == handle.layer.som_lr
    assert same(train(loaded.network), train(twin))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("bound", [True, False])
def test_gradient_checkpointing(hf, reentrant, bound):
    model, twin = hf_pair(hf)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.gradient_checkpointing
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    if bound:
        bind_all(model, optimizer)
    model.train()
    for x, y in DATA:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(state(model.network), train(twin, bound=bound))


def hf_trainer(hf, model, path, bind, *, window, bf16=False, clip=0.0, epochs=2, **arguments):
    """A Trainer over the samples of DATA in their order; its optimizer is bound as `bind` says."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    transformers = hf.transformers
    samples = [{"x": x, "labels": label} for xs, ys in DATA for x, label in zip(xs, ys, strict=True)]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    if bind == "own":
        bind_all(model, optimizer)

    class Binds(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **rest):
            if bind == "callback":
                bind_wrapped(model, optimizer)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *arguments):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(
        model,
        transformers.TrainingArguments(
            str(path),
            num_train_epochs=epochs,
            per_device_train_batch_size=SAMPLES[0],
            use_cpu=True,
            bf16=bf16,
            gradient_accumulation_steps=window,
            max_grad_norm=clip,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            **{"save_strategy": "no", **arguments},
        ),
        train_dataset=samples,
        callbacks=[Binds()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )


def train_as_trainer_does(twin, bound, window, bf16=False, clip=None, epochs=2):
    """The plain loop, but with the mean loss over what a window really holds."""
    optimizer = OPTIMIZERS["sgd"](twin.parameters())
    for _ in range(epochs):
        for start in range(0, len(DATA), window):
            part = DATA[start : start + window]
            train(twin, optimizer, bound=bound, data=part, window=len(part), bf16=bf16, clip=clip)
    return state(twin)


@pytest.mark.parametrize(
    "window, bind, options",
    [
        (1, None, {}),
        (1, "own", {}),
        (4, "callback", {}),
        (4, None, dict(bf16=True)),
        (4, "own", dict(clip=0.05)),
        (1, "callback", dict(clip=0.05)),
    ],
)
def test_trainer(hf, tmp_path, window, bind, options):
    model, twin = hf_pair(hf)
    hf_trainer(hf, model, tmp_path, bind, window=window, **options).train()
    assert same(state(model.network), train_as_trainer_does(twin, bind is not None, window, **options))


@pytest.mark.parametrize("bind", [None, "own", "callback"])
def test_trainer_resumes_from_the_middle_of_an_epoch(hf, tmp_path, bind):
    model, twin = hf_pair(hf)
    hf_trainer(hf, model, tmp_path, bind, window=1, epochs=1, save_strategy="steps", save_steps=5).train()
    resumed = hf(hf.config_class())
    with torch.no_grad():
        for tensor in resumed.state_dict().values():
            tensor.zero_()
    hf_trainer(hf, resumed, tmp_path, bind, window=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(state(resumed.network), train_as_trainer_does(twin, bind is not None, 1))


# --- accelerate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    """accelerate, whose singletons forget what other tests asked of them."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()
    yield accelerate
    reset()


def accelerated(accelerate, model, bind, *, window=1, bf16=False, clip=None, data=DATA, epochs=2, path=None, at=None):
    """The loop of `train` in accelerate's words; saves its state after `at` steps in `path`, or loads it from there."""
    precision = "bf16" if bf16 else "no"
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=window, mixed_precision=precision)
    optimizer, loader = OPTIMIZERS["sgd"](model.parameters()), torch.utils.data.DataLoader(data, batch_size=None)
    if bind == "before":
        bind_all(model, optimizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if bind == "after":
        bind_wrapped(model, optimizer)
    if path is not None and at is None:
        accelerator.load_state(path)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            if i + 1 == at:
                accelerator.save_state(path)
    return state(accelerator.unwrap_model(model))


binds = pytest.mark.parametrize("bind", [None, "before", "after"])


@pytest.mark.parametrize(
    "window, bind, options",
    [
        (1, None, {}),
        (1, "before", {}),
        (4, "after", {}),
        (4, None, dict(bf16=True)),
        (4, "before", dict(clip=0.05)),
        (1, "after", dict(clip=0.05)),
    ],
)
def test_accelerator(accelerate, window, bind, options):
    model, twin = network(), network()
    expected = train(twin, bound=bind is not None, window=window, epochs=2, **options)
    assert same(accelerated(accelerate, model, bind, window=window, **options), expected)


@binds
@pytest.mark.parametrize("window, at", [(1, 5), (4, 4)])
def test_accelerator_saves_and_loads_its_state(accelerate, tmp_path, window, at, bind):
    accelerated(accelerate, network(), bind, window=window, epochs=1, path=tmp_path, at=at)
    resumed = network(seed=7)
    got = accelerated(accelerate, resumed, bind, window=window, data=DATA[at:], epochs=1, path=tmp_path)
    assert same(got, train(network(), bound=bind is not None, window=window))


@pytest.mark.parametrize("include_buffers", [False, True])
def test_empty_model_with_a_dispatched_checkpoint_continues(accelerate, tmp_path, memory, include_buffers):
    twin = network()
    train(twin, data=DATA[:6])
    torch.save(twin.state_dict(), tmp_path / "pytorch_model.bin")
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = network()
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "pytorch_model.bin"), device_map={"": "cpu"})
    assert same(state(model), state(twin))
    assert model.eval()(DATA[0][0]).equal(twin.eval()(DATA[0][0]))
    assert same(train(model, "adamw"), train(twin, "adamw"))
    assert model[1].backend == twin[1].backend


@may_start_afresh
@pytest.mark.parametrize("include_buffers", [False, True])
def test_empty_model_with_a_dispatched_plain_checkpoint(accelerate, tmp_path, memory, include_buffers):
    """The buffers that the checkpoint does not have are left on meta."""
    twin = network(plain=True)
    torch.save(twin.state_dict(), tmp_path / "pytorch_model.bin")
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = network()
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "pytorch_model.bin"), device_map={"": "cpu"})
    twin[1] = BCLLayer.from_linear(twin[1], **OPTIONS)
    assert model.eval()(DATA[0][0]).equal(twin.eval()(DATA[0][0]))
    assert same(train(model), train(twin))


# --- peft -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def test_lora_elsewhere_leaves_the_layer_an_exact_linear(peft):
    """A frozen base: no mask, no pull, no state."""
    layered, plain = network(), network(plain=True)
    plain.load_state_dict({k: v for k, v in layered.state_dict().items() if k in plain.state_dict()})
    before, models = state(layered[1]), []
    for base in (layered, plain):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "3"], r=2))
        train(model, "adamw", bound=False)
        models.append(model.merge_and_unload())
    assert same(before, state(models[0][1]))
    assert all(value.equal(models[0].state_dict()[name]) for name, value in models[1].state_dict().items())


def test_lora_on_the_layer_itself_is_lora_on_a_linear(peft):
    """peft takes it for the nn.Linear it is; unfrozen after the merge it trains as a BCLLayer of the merged weight."""
    layered, plain = network(), network(plain=True)
    plain.load_state_dict({k: v for k, v in layered.state_dict().items() if k in plain.state_dict()})
    before, merged = state(layered[1]), []
    for base in (layered, plain):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["1"], r=2, init_lora_weights="gaussian"))
        train(model, "adamw", bound=False)
        merged.append(model.merge_and_unload())
    layer = merged[0][1]
    assert isinstance(layer, BCLLayer) and int(layer.step) == 0 and layer.neighbors.equal(before["neighbors"])
    assert all(value.equal(merged[0].state_dict()[name]) for name, value in merged[1].state_dict().items())
    assert not layer.weight.equal(before["weight"])
    merged[1][1] = BCLLayer.from_linear(merged[1][1], **OPTIONS)
    for model in merged:
        model.requires_grad_(True)
    assert same(train(merged[0]), train(merged[1]))


def peft_with_trained_copy(peft, base):
    """The layer is copied by peft, and the copy is trained beside LoRA on another layer."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["3"], modules_to_save=["1"], r=2)
    return peft.get_peft_model(base, config)


def trained_copy(model):
    return model.base_model.model[1].modules_to_save["default"]


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("trained", [0, 3])
def test_a_module_to_save_is_trained_as_a_copy(peft, trained, bound):
    """Against the same peft model made of a Linear, whose copy becomes a BCLLayer by hand."""
    layered, plain = network(), network(plain=True)
    train(layered, data=DATA[:trained])
    plain.load_state_dict({k: v for k, v in layered.state_dict().items() if k in plain.state_dict()})
    before, hand_made = state(layered[1]), copy.deepcopy(layered[1])
    model, other = (peft_with_trained_copy(peft, base) for base in (layered, plain))
    other.base_model.model[1].modules_to_save["default"] = hand_made
    train(model, bound=bound)
    train(other, bound=bound)
    layer = trained_copy(model)
    assert int(layer.step) == trained + len(DATA) and same(state(layer), state(hand_made))
    assert same(before, state(model.base_model.model[1].original_module)), "the original moved"
    merged = model.merge_and_unload()
    assert same(state(merged[1]), state(hand_made))
    merged.requires_grad_(True)
    assert same(train(merged, bound=bound), train(other.merge_and_unload().requires_grad_(True), bound=bound))


def test_a_saved_adapter_continues(peft, tmp_path):
    model = peft_with_trained_copy(peft, network())
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True)
    assert same(state(trained_copy(loaded)), state(trained_copy(model)))
    train(model)
    train(loaded)
    assert same(state(trained_copy(loaded)), state(trained_copy(model)))
