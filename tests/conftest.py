"""What every test runs under: one thread, uninitialized memory that shows, and repeatable property tests."""

import functools
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("helpers")
from helpers import cuda_host, interpreter  # noqa: E402

interpreter.enable()  # before anything imports triton
cuda_host.enable()

torch.set_num_threads(1)  # the sizes here are small, and sums then have one order

settings.register_profile(
    "bcl_fast",
    deadline=None,  # a first call may compile
    derandomize="CI" in os.environ,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be shared
)
settings.load_profile("bcl_fast")

POISON = True


def poison(tensor: torch.Tensor) -> None:
    """NaN, or the largest integer, everywhere: nothing that was never written passes for a number."""
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex:
        value = torch.nan
    else:
        value = True if dtype == torch.bool else torch.iinfo(dtype).max
    with torch.no_grad():
        tensor.fill_(value)


def poisoned(make):
    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if (
            POISON and type(tensor) is torch.Tensor and not torch.compiler.is_compiling()
        ):  # a compiler's hold no numbers
            poison(tensor)
        return tensor

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialized_memory():
    """Every `empty` that Python code asks for comes poisoned.

    Not `torch.utils.deterministic.fill_uninitialized_memory`: it needs deterministic algorithms, so the tests would run
    other code than users do.
    """
    with torch.device("cpu"):  # a device context finds only functions that were there when the first one was used
        torch.empty(0)
    makers = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    makers += [(torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in makers:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        assert torch.empty(1).isnan()
        yield


@pytest.fixture
def memory_as_it_comes(monkeypatch):
    """For a test that counts launches: on a GPU, poisoning memory is one."""
    monkeypatch.setattr(sys.modules[__name__], "POISON", False)


@pytest.fixture(params=["largest", "zeros", "sevens"])
def memory(request, monkeypatch):
    """What uninitialized memory holds: a number that no step can be, zeros as fresh pages do, or what a step can be."""
    value = {"zeros": 0, "sevens": 7}.get(request.param)
    if value is not None:
        monkeypatch.setattr(sys.modules[__name__], "poison", lambda tensor: tensor.detach().fill_(value))
