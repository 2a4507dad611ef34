"""Diversity losses: values worked by hand, and gradients, also where a naive formula has none."""

import math

import pytest
import torch
from torch import tensor

from bcl_fast.diagnostics import row_cosine
from bcl_fast.losses import activation_entropy_loss, weight_similarity_loss

F64 = torch.float64


def test_weight_similarity_values():
    close = torch.testing.assert_close
    close(weight_similarity_loss(tensor([[1.0, 2.0], [3.0, 6.0]])), tensor(1.0))
    close(weight_similarity_loss(torch.eye(3)), tensor(0.0))
    triangle = tensor([[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])
    close(weight_similarity_loss(triangle), tensor(-0.5))  # -1 / (D - 1)
    weight = torch.randn(6, 4, dtype=F64)
    assert float(weight_similarity_loss(weight)) == pytest.approx(row_cosine(weight), abs=1e-12)


def test_activation_entropy_values():
    close = torch.testing.assert_close
    close(activation_entropy_loss(torch.ones(5, 4)), tensor(-math.log(4)))
    close(activation_entropy_loss(tensor([[0.0, -7.0], [0.0, 7.0]])), tensor(0.0))
    close(activation_entropy_loss(tensor([[3.0, -1.0]])), tensor(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    activation = torch.randn(2, 3, 5)
    close(activation_entropy_loss(activation), activation_entropy_loss(activation.reshape(6, 5)))


def test_gradients():
    weight = torch.randn(5, 4, dtype=F64, requires_grad=True)
    activation = torch.randn(7, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(weight_similarity_loss, (weight,))
    assert torch.autograd.gradcheck(activation_entropy_loss, (activation,))
    assert torch.autograd.gradgradcheck(weight_similarity_loss, (weight,))


def test_gradients_with_a_zero_row_or_an_idle_feature():
    weight = torch.randn(5, 4, dtype=F64)
    weight[2] = 0
    weight.requires_grad_()
    weight_similarity_loss(weight).backward()
    assert weight.grad.isfinite().all() and weight.grad[2].count_nonzero() == 0 and weight.grad[0].count_nonzero() == 4
    activation = torch.randn(7, 5, dtype=F64)
    activation[:, 3] = 0
    activation.requires_grad_()
    activation_entropy_loss(activation).backward()
    assert activation.grad.isfinite().all() and activation.grad[:, 3].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(4, 3), (0, 3)])
def test_no_activity_at_all(shape):
    activation = torch.zeros(shape, requires_grad=True)
    loss = activation_entropy_loss(activation)
    loss.backward()
    assert loss == 0 and activation.grad.isfinite().all()


@pytest.mark.parametrize("dtype, exponents", [(torch.float32, (-100, 60, 90)), (F64, (-900, 500, 900))], ids=str)
def test_weight_similarity_does_not_depend_on_the_norms(dtype, exponents):
    """Norms are constants of the rows: the gradient shrinks as they grow. Powers of two: no rounding differs."""
    weight = torch.randn(3, 4, dtype=dtype)
    scale = tensor([[2.0**e] for e in exponents], dtype=dtype)
    found = []
    for rows in (weight, weight * scale):
        rows.requires_grad_()
        loss = weight_similarity_loss(rows)
        loss.backward()
        found.append((loss.detach(), rows.grad))
    (loss, gradient), (scaled_loss, scaled_gradient) = found
    assert scaled_loss.equal(loss) and (scaled_gradient * scale).equal(gradient)


def test_descent_on_them_diversifies():
    torch.manual_seed(0)
    weight = (torch.randn(1, 8) + 0.3 * torch.randn(6, 8)).requires_grad_()
    optimizer = torch.optim.Adam([weight], 0.1)
    start = row_cosine(weight.detach())
    for _ in range(100):
        optimizer.zero_grad()
        weight_similarity_loss(weight).backward()
        optimizer.step()
    assert start > 0.8 and row_cosine(weight.detach()) < -0.15


@pytest.mark.parametrize(
    "loss, value, error, message",
    [
        (weight_similarity_loss, torch.ones(3, 2, dtype=torch.int64), TypeError, "weight must be floating point"),
        (weight_similarity_loss, torch.ones(3), ValueError, r"weight must have at least 2 dimensions, got shape \[3\]"),
        (weight_similarity_loss, torch.ones(1, 2), ValueError, r"weight must have shape \[D, N\] with D >= 2"),
        (weight_similarity_loss, torch.ones(2, 2, 2), ValueError, r"weight must have shape \[D, N\] with D >= 2"),
        (activation_entropy_loss, torch.ones(3, dtype=torch.int32), TypeError, "activation must be floating point"),
        (activation_entropy_loss, torch.tensor(1.0), ValueError, "activation must have at least 1 dimension, got"),
    ],
)
def test_bad_input(loss, value, error, message):
    with pytest.raises(error, match=message):
        loss(value)
