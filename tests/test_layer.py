"""BCLLayer and attach_bcl as modules: construction, modes, input, state, observing."""

import pytest
import torch
from helpers.backends import ON_CPU
from helpers.layers import D, N, batch, check_one_step, each_backend, make, same, state, variants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bcl_fast import reference as ref
from bcl_fast.backends import FASTEST
from bcl_fast.layer import BCLLayer
from bcl_fast.spec import CHOICES, BCLConfig
from bcl_fast.testing import VARIANTS

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
def test_one_step_is_the_specification(backend, options):
    check_one_step(backend, options)


@each_backend
def test_one_step_without_a_bias_is_the_specification(backend):
    for name in ("decoupled", "cosine-soft", "offset-coupled"):
        check_one_step(backend, VARIANTS[name], bias=False)


@each_backend
def test_neighbors_are_refreshed_when_due(backend):
    """From the weight of that step's forward; between refreshes they stay (step 1)."""
    layer = make(backend, recompute_every=3, som_lr=0.5)
    for step in range(8):
        if step % 3 == 0:
            expected = ref.neighbors(layer.weight.detach(), 3)
        layer(batch(seed=step)).square().sum().backward()
        assert layer.neighbors.equal(expected), step
    assert not expected.equal(ref.neighbors(layer.weight.detach(), 3)), "nothing has changed that a refresh would find"


@pytest.mark.parametrize("name", ["decoupled", "soft-clamp", "winner-take-all", "offset-coupled", "all-neighbors"])
def test_backends_train_alike(name):
    weights = []
    for backend in ON_CPU:
        layer = make(backend, dtype=torch.float64, **VARIANTS[name])
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
def test_frozen_and_zero_som_lr_stop_only_the_pull(backend):
    frozen, still, free = (make(backend) for _ in range(3))
    frozen.frozen, still.som_lr = True, 0
    before = free.weight.detach().clone()
    for each in (frozen, still, free):
        each(batch()).square().sum().backward()
    for each in (frozen, still):
        assert each.weight.equal(before) and not free.weight.equal(before)
        assert each.weight.grad.equal(free.weight.grad)  # the mask stays
        assert int(each.step) == 1


# --- Input -----------------------------------------------------------------------------------------------------------


@each_backend
def test_leading_dimensions_are_samples(backend):
    for leading in ((), (6,), (2, 3), (1, 2, 3)):
        flat, shaped = make(backend), make(backend)
        x = batch(torch.Size(leading).numel())
        flat(x).square().sum().backward()
        output = shaped(x.reshape(*leading, N))
        output.square().sum().backward()
        assert output.shape == (*leading, D)
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
def test_empty_batch(backend):
    layer = make(backend)
    before = state(layer)
    for leading in ((0,), (3, 0)):
        output = layer(torch.empty(*leading, N, requires_grad=True))
        output.sum().backward()
        assert output.shape == (*leading, D) and same(before, state(layer))


@each_backend
def test_tiny_batches_stay_finite(backend):
    for options in VARIANTS.values():
        layer = make(backend, **options)
        for B in (1, 2, 1):
            layer(batch(B)).square().sum().backward()
        assert all(value.isfinite().all() for value in layer.state_dict().values()), options
        assert int(layer.step) == 3


def test_two_features():
    layer = BCLLayer(N, 2)
    layer(batch()).sum().backward()
    assert layer.neighbors.tolist() == [[1], [0]]


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
def test_bad_input(x, error, message):
    for training in (True, False):
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
def test_nan_and_inf_do_not_crash(backend):
    x = batch()
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    for options in VARIANTS.values():
        layer = make(backend, **options)
        for _ in range(2):
            layer(x).sum().backward()
        assert ((layer.neighbors >= 0) & (layer.neighbors < D)).all() and int(layer.step) == 2, options


def test_parametrized_weight_raises():
    layer = make()
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(RuntimeError, match="weight must be a leaf: .*remove the parametrization"):
        layer(batch())
