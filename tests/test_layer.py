"""BCLLayer and attach_bcl as modules: construction, modes, input, state, observing."""

import copy
import io
import pickle

import pytest
import torch
from helpers.backends import ON_CPU
from helpers.layers import D, N, batch, check_one_step, each_backend, make, same, state, variants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bcl_fast import reference as ref
from bcl_fast.attach import AttachedBCL, attach_bcl
from bcl_fast.backends import FASTEST
from bcl_fast.layer import BCLLayer
from bcl_fast.spec import CHOICES, BCLConfig

# --- Construction ----------------------------------------------------------------------------------------------------


def test_starts_like_a_linear_of_the_same_seed():
    torch.manual_seed(0)
    linear = nn.Linear(N, D)
    layer = make()
    assert layer.weight.equal(linear.weight) and layer.bias.equal(linear.bias)
    assert isinstance(layer, nn.Linear)


def test_buffers():
    layer = make()
    assert list(layer.state_dict()) == ["weight", "bias", "neighbors", "step"]
    assert layer.neighbors.shape == (D, 3) and layer.neighbors.dtype == torch.int64
    assert layer.step.shape == () and layer.step.dtype == torch.int64
    assert layer.som_offset is None
    offset = make(som_space="offset")
    assert offset.som_offset.shape == (D, N) and offset.som_offset.count_nonzero() == 0
    assert make(neighborhood_k=100).neighbors.shape == (D, D - 1)


def test_options_override_the_config():
    layer = make(config=BCLConfig(som_lr=0.1, rescue_k=7), som_lr=0.2, affinity="cosine")
    assert (layer.config.som_lr, layer.config.rescue_k, layer.config.affinity) == (0.2, 7, "cosine")


def test_backends_by_name_and_default():
    assert make().backend == FASTEST["cpu"][0]
    assert make(fused=False).backend == "reference"
    assert make("reference").backend == "reference"


def test_extra_repr_tells_backend_and_changed_options():
    text = repr(make(som_lr=0.25, bias=False))
    for part in ("in_features=13", "bias=False", f"backend={FASTEST['cpu'][0]}", "som_lr=0.25", "neighborhood_k=3"):
        assert part in text
    assert "rescue_k" not in text


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((N, 1), {}, ValueError, "out_features must be an integer >= 2, got 1"),
        ((0, D), {}, ValueError, "in_features must be an integer >= 1, got 0"),
        ((N, 2.5), {}, TypeError, "out_features must be an integer >= 2, got 2.5"),
        ((N, D), dict(som_lr=-1), ValueError, "som_lr must be a finite number >= 0, got -1"),
        ((N, D), dict(rescue=3), TypeError, "unknown option 'rescue'; known options: som_lr"),
        ((N, D), dict(config={"som_lr": 1}), TypeError, "config must be a BCLConfig or None"),
        ((N, D), dict(backend="cuda9"), ValueError, "backend must be None or one of"),
        ((N, D), dict(dtype=torch.int32), TypeError, "dtype must be one of torch.float32"),
        ((N, D), dict(dtype=torch.complex64), TypeError, "dtype must be one of"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        BCLLayer(*arguments, **options)


def test_som_lr_may_be_scheduled_and_is_checked():
    layer = make(som_lr=0.1)
    layer.som_lr = 0.3
    assert layer.som_lr == layer.config.som_lr == 0.3
    with pytest.raises(ValueError, match="som_lr must be a finite number >= 0, got -0.5"):
        layer.som_lr = -0.5
    assert layer.som_lr == 0.3


# --- One step equals SPEC.md -----------------------------------------------------------------------------------------


@each_backend
@variants
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_is_the_specification(backend, options, bias):
    check_one_step(backend, options, bias)


@variants
def test_backends_train_alike(options):
    weights = []
    for backend in ON_CPU:
        layer = make(backend, dtype=torch.float64, **options)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        for step in range(20):
            layer(batch(seed=step, dtype=torch.float64)).relu().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(layer.weight.detach())
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0])


CONFIGS = st.fixed_dictionaries(
    {name: st.sampled_from(allowed) for name, allowed in CHOICES.items() if name != "sync"}
    | dict(
        neighborhood_k=st.integers(1, 30),
        rescue_k=st.integers(0, 40),
        temperature=st.floats(0.1, 20),
        need_weighting=st.booleans(),
        rescue_onset=st.sampled_from([0.0, 0.2, 1.0]),
        pull_onset=st.sampled_from([0.0, 0.2, 1.0]),
    )
)


@settings(max_examples=100)
@given(options=CONFIGS, B=st.integers(1, 30), d=st.integers(2, 20), n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_any_shape_and_config_makes_the_same_step_on_every_backend(options, B, d, n, seed):
    results = []
    for backend in ON_CPU:
        torch.manual_seed(seed)
        layer = BCLLayer(n, d, backend=backend, som_lr=0.1, dtype=torch.float64, **options)
        x = torch.randn(B, n, dtype=torch.float64, requires_grad=True)
        layer(x).square().sum().backward()
        results.append((layer.weight.detach(), layer.weight.grad, layer.bias.grad, x.grad, *layer.buffers()))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected)


@each_backend
def test_masked_backward_is_the_derivative_where_the_mask_is_one(backend):
    """Without a mask and a pull the layer is a Linear: gradcheck against finite differences."""
    layer = make(backend, gradient_mask="none", som_lr=0.0, dtype=torch.float64)
    x = batch(5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), nondet_tol=0.0)


@each_backend
@pytest.mark.parametrize("kind", ["soft", "winner_take_all"])
def test_masked_backward_is_linear_in_the_incoming_gradient(backend, kind):
    layer = make(backend, gradient_mask=kind, som_lr=0.0, dtype=torch.float64)
    x = batch(dtype=torch.float64).requires_grad_()
    one, two = (torch.randn(17, D, dtype=torch.float64) for _ in range(2))
    gradient = [torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), g) for g in (one, two, 2 * one - 3 * two)]
    for a, b, c in zip(*gradient, strict=True):
        torch.testing.assert_close(2 * a - 3 * b, c)


# --- Modes in which it is an exact nn.Linear -------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "frozen weight"])
def test_is_an_exact_linear(backend, mode):
    layer, x = make(backend), batch()
    before = state(layer)
    if mode == "eval":
        layer.eval()
    if mode == "frozen weight":
        layer.weight.requires_grad_(False)
    guard = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    x.requires_grad_(mode in ("eval", "frozen weight"))
    with guard():
        output = layer(x)
    assert output.equal(F.linear(x, layer.weight, layer.bias))
    if x.requires_grad:
        gradient = torch.autograd.grad(output.square().sum(), x)[0]
        assert gradient.equal(torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), x)[0])
    assert same(before, state(layer))


def test_frozen_weight_still_trains_the_bias():
    layer = make()
    layer.weight.requires_grad_(False)
    layer(batch()).sum().backward()
    assert layer.bias.grad.equal(torch.full((D,), 17.0)) and int(layer.step) == 0


def test_offset_takes_part_in_evaluation():
    layer = make(som_space="offset").eval()
    layer.som_offset.fill_(0.5)
    assert layer(batch()).equal(F.linear(batch(), layer.weight + layer.som_offset, layer.bias))


@each_backend
@pytest.mark.parametrize("how", ["frozen", "som_lr"])
def test_frozen_and_zero_som_lr_stop_only_the_pull(backend, how):
    layer, free = make(backend), make(backend)
    if how == "frozen":
        layer.frozen = True
    else:
        layer.som_lr = 0
    before = layer.weight.detach().clone()
    for each in (layer, free):
        each(batch()).square().sum().backward()
    assert layer.weight.equal(before) and not free.weight.equal(before)
    assert layer.weight.grad.equal(free.weight.grad)  # the mask stays
    assert int(layer.step) == 1


# --- Input -----------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("shape", [(N,), (6, N), (2, 3, N), (1, 2, 3, N)], ids=str)
def test_leading_dimensions_are_samples(backend, shape):
    flat, shaped = make(backend), make(backend)
    x = batch(6)[: max(1, torch.Size(shape[:-1]).numel())]
    flat(x).square().sum().backward()
    output = shaped(x.reshape(shape))
    output.square().sum().backward()
    assert output.shape == (*shape[:-1], D)
    assert same(state(flat), state(shaped)) and flat.weight.grad.equal(shaped.weight.grad)


@each_backend
def test_padding_is_left_out_by_its_mask(backend):
    """layer(x[mask]) is what the docstring says: rows that are no samples neither compete nor are rescued."""
    packed, padded = make(backend), make(backend)
    x, lengths = batch(12).reshape(3, 4, N), torch.tensor([4, 1, 3])
    mask = torch.arange(4) < lengths[:, None]
    x[~mask] = 0.0
    target = torch.randn(3, 4, D)
    packed(torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])).backward(target[mask])
    output = torch.zeros(3, 4, D)
    output[mask] = padded(x[mask])
    (output * target).sum().backward()
    assert same(state(packed), state(padded)) and packed.weight.grad.equal(padded.weight.grad)


@each_backend
def test_strided_input(backend):
    plain, strided = make(backend), make(backend)
    x = batch()
    apart = torch.empty(N, 2 * 17).T[::2].copy_(x)
    assert not apart.is_contiguous()
    plain(x).square().sum().backward()
    strided(apart).square().sum().backward()
    torch.testing.assert_close(strided.weight, plain.weight)


@each_backend
@pytest.mark.parametrize("shape", [(0, N), (3, 0, N)], ids=str)
def test_empty_batch(backend, shape):
    layer = make(backend)
    before = state(layer)
    output = layer(torch.empty(shape, requires_grad=True))
    output.sum().backward()
    assert output.shape == (*shape[:-1], D) and same(before, state(layer))


@each_backend
@variants
@pytest.mark.parametrize("B", [1, 2])
def test_tiny_batches_stay_finite(backend, options, B):
    layer = make(backend, **options)
    for seed in range(3):
        layer(batch(B, seed)).square().sum().backward()
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert int(layer.step) == 3


def test_two_features():
    layer = BCLLayer(N, 2)
    layer(batch()).sum().backward()
    assert layer.neighbors.tolist() == [[1], [0]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(4, N + 1), ValueError, r"input must have shape \[..., 13\], got \[4, 14\]"),
        (torch.tensor(1.0), ValueError, r"input must have shape \[..., 13\], got \[\]"),
        (torch.zeros(4, N, dtype=torch.int64), TypeError, "input must be dense floating point, got torch.int64"),
        (torch.zeros(4, N, dtype=torch.float64), TypeError, "input must be torch.float32 .* got torch.float64"),
        ([[0.0] * N], TypeError, "input must be a tensor, got list"),
    ],
)
def test_bad_input(training, x, error, message):
    layer = make().train(training)
    before = state(layer)
    with pytest.raises(error, match=message):
        layer(x)
    assert same(before, state(layer))


def test_check_finite_raises_before_anything_changes():
    layer, x = make(check_finite=True), batch()
    x[2, 3] = torch.inf
    before = state(layer)
    with pytest.raises(ValueError, match="x must be finite .* got 1 NaN or Inf of 221"):
        layer(x)
    assert same(before, state(layer))


@each_backend
@variants
def test_nan_and_inf_do_not_crash(backend, options):
    layer = make(backend, **options)
    x = batch()
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    for _ in range(3):
        layer(x).sum().backward()
    assert ((layer.neighbors >= 0) & (layer.neighbors < D)).all() and int(layer.step) == 3


def test_parametrized_weight_raises():
    layer = make()
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(RuntimeError, match="weight must be a leaf: .*remove the parametrization"):
        layer(batch())


# --- State -----------------------------------------------------------------------------------------------------------


def train(layer, steps, start=0):
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    for step in range(start, start + steps):
        layer(batch(seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@each_backend
@pytest.mark.parametrize("options", [{}, dict(som_space="offset"), dict(dtype=torch.bfloat16)], ids=str)
@pytest.mark.parametrize("saved_at", [4, 5, 6])
def test_resumed_run_is_bit_equal_across_the_refresh(backend, options, saved_at):
    def run(layer, steps, start=0):
        optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
        for step in range(start, start + steps):
            layer(batch(seed=step, dtype=layer.weight.dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    through, first, resumed = (make(backend, seed, recompute_every=5, **options) for seed in (0, 0, 7))
    run(through, 12)
    run(first, saved_at)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved))
    run(resumed, 12 - saved_at, saved_at)
    assert same(state(through), state(resumed))


def test_checkpoint_of_a_plain_linear_loads_and_starts_afresh():
    layer, linear = make(som_space="offset", recompute_every=2), nn.Linear(N, D)
    train(layer, 3)
    assert layer.load_state_dict(linear.state_dict()) == ([], [])
    assert layer.weight.equal(linear.weight) and int(layer.step) == 0 and layer.som_offset.count_nonzero() == 0
    layer(batch()).sum().backward()
    assert layer.neighbors.equal(ref.neighbors(linear.weight.detach(), 3))


def test_checkpoint_of_a_plain_model_loads_into_one_with_layers():
    plain = nn.Sequential(nn.Linear(N, D), nn.ReLU(), nn.Linear(D, N))
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(D, N))
    checkpoint = plain.state_dict()
    model.load_state_dict(checkpoint)
    assert list(checkpoint) == list(plain.state_dict())  # the caller's dict is left alone
    assert model[0].weight.equal(plain[0].weight)


def test_bad_checkpoints_raise():
    layer = make()
    partial = layer.state_dict()
    del partial["step"]
    with pytest.raises(RuntimeError, match='Missing key.*"step"'):
        make().load_state_dict(partial)
    with pytest.raises(RuntimeError, match="size mismatch for neighbors"):
        make(neighborhood_k=4).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_by_themselves(how, trained):
    layer = make()
    train(layer, trained)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same(state(layer), state(twin))
    before = state(layer)
    train(twin, 3, start=trained)
    assert same(before, state(layer)), "training the copy moved the original"
    train(layer, 3, start=trained)
    assert same(state(layer), state(twin))


@pytest.mark.parametrize("how", ["to_empty", "assign", "new parameter", "to dtype"])
def test_pull_survives_a_replaced_parameter(how):
    layer = make()
    train(layer, 1)
    if how == "to_empty":
        layer.to_empty(device="cpu")
        layer.reset_parameters()
    elif how == "assign":
        layer.load_state_dict(make(seed=3).state_dict(), assign=True)
    elif how == "new parameter":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        layer.to(torch.float64)
    start, dtype = int(layer.step), layer.weight.dtype
    before = layer.weight.detach().clone()
    layer(batch(dtype=dtype)).sum().backward()
    assert int(layer.step) == start + 1 and not layer.weight.equal(before)


def test_reset_parameters_resets_the_competition():
    layer = make()
    train(layer, 3)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert same(state(layer), state(make()))


def test_built_on_meta_and_materialised():
    layer = make(device="meta")
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    train(layer, 2)
    other = make()
    train(other, 2)
    assert same(state(layer), state(other))


def test_a_deleted_layer_leaves_its_weight_trainable():
    layer = make()
    weight = layer.weight
    del layer
    (weight.sum() * 2).backward()
    assert weight.grad.equal(torch.full_like(weight, 2.0))


# --- from_linear and attach_bcl --------------------------------------------------------------------------------------


def test_from_linear_shares_parameters_mode_and_draws_no_random_numbers():
    linear = nn.Linear(N, D, dtype=torch.float64).eval()
    random = torch.get_rng_state()
    layer = BCLLayer.from_linear(linear, rescue_k=2, backend="reference")
    assert torch.get_rng_state().equal(random)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.config.rescue_k == 2 and layer.backend == "reference"
    layer.train()(batch(dtype=torch.float64)).sum().backward()
    assert int(layer.step) == 1
    assert BCLLayer.from_linear(nn.Linear(N, D, bias=False)).bias is None
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got ReLU"):
        BCLLayer.from_linear(nn.ReLU())


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(N, D), nn.ReLU()), "decoder": nn.Linear(D, N)})


def test_attach_trains_in_place_and_remove_restores_a_linear():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    original = net["encoder"][0]
    handle = attach_bcl(net, "encoder.0", som_lr=0.1)
    assert isinstance(handle, AttachedBCL) and net["encoder"][0] is handle.layer
    assert handle.layer.weight is original.weight  # the optimizer stays valid
    net["decoder"](net["encoder"](batch())).square().mean().backward()
    optimizer.step()
    assert int(handle.layer.step) == 1
    trained = handle.layer.weight.detach().clone()
    handle.remove()
    handle.remove()
    assert net["encoder"][0] is original and type(original) is nn.Linear and original.weight.equal(trained)
    net["decoder"](net["encoder"](batch())).square().mean().backward()
    assert original.weight.equal(trained) and int(handle.layer.step) == 1


def test_remove_adds_the_offset_so_that_the_output_stays():
    net = model()
    handle = attach_bcl(net, "encoder.0", som_space="offset", som_lr=0.5)
    net["encoder"](batch()).square().mean().backward()
    assert handle.layer.som_offset.count_nonzero()
    before = net.eval()["encoder"](batch())
    handle.remove()
    assert net["encoder"](batch()).equal(before)


@pytest.mark.parametrize("name", ["encoder.1", "encoder", "nowhere", ""])
def test_attach_lists_the_linears_for_a_bad_name(name):
    with pytest.raises(ValueError, match=r"one of \['encoder.0', 'decoder'\], got '" + name):
        attach_bcl(model(), name)


# --- Observing -------------------------------------------------------------------------------------------------------


@each_backend
@variants
def test_observing_changes_no_number_and_records_the_specification(backend, options):
    options = {"recompute_every": 2, **options}
    watched, alone = (make(backend, **options) for _ in range(2))
    records = []
    with watched.observe(records.append):
        train(watched, 3)
    train(alone, 3)
    assert same(state(watched), state(alone))
    assert [record.step for record in records] == [0, 1, 2]
    fresh = make(backend, **options)
    for step, record in enumerate(records):
        before = state(fresh)
        weight = before["weight"] + before.get("som_offset", 0)
        train(fresh, 1, start=step)
        expected = ref.record(step, batch(seed=step), weight, before["bias"], F.linear(batch(seed=step), weight,
                              before["bias"]), fresh.neighbors, fresh.config)  # fmt: skip
        for name, value in vars(expected).items():
            got = getattr(record, name)
            assert got.equal(value) if torch.is_tensor(value) else got == value, name


def test_records_keep_their_numbers_when_training_goes_on():
    layer, records = make(), []
    with layer.observe(records.append):
        train(layer, 1)
    kept = {name: value.clone() for name, value in vars(records[0]).items() if torch.is_tensor(value)}
    train(layer, 3, start=1)
    assert all(getattr(records[0], name).equal(value) for name, value in kept.items())


def test_several_observers_and_the_end_of_observing():
    layer, one, two = make(), [], []
    with layer.observe(one.append):
        with layer.observe(two.append):
            train(layer, 1)
        train(layer, 1)
    train(layer, 1)
    assert (len(one), len(two)) == (2, 1)
    with pytest.raises(TypeError, match="callback must be callable, got 3"), layer.observe(3):
        pass


def test_an_observers_error_comes_through_and_loses_nothing():
    layer, other = make(), make()

    def fail(record):
        raise KeyError("observer")

    with layer.observe(fail), pytest.raises(KeyError, match="observer"):
        layer(batch()).sum().backward()
    other(batch()).sum().backward()
    assert same(state(layer), state(other))


def test_without_an_observer_nothing_dense_is_kept(monkeypatch):
    """Only what the backward and the pull need outlives the forward."""
    layer = BCLLayer(40, 50)
    x = torch.randn(60, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    dense = [t for t in kept if t.numel() >= 50 * 60]
    assert len(dense) == 1  # the gradient mask
    monkeypatch.setattr(ref, "record", lambda *a: pytest.fail("a record was formed"))
    train_once = layer(x).sum()
    train_once.backward()
    assert layer._pulls.idle
