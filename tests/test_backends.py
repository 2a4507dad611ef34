"""Which backends there are, which stages each serves, and which of them serves a layer."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.operators import B, D

from bcl_fast import BCLLayer, backends, cpu, cuda


def test_every_backend_serves_every_stage():
    for name in backends.STAGES:
        for backend in set(backends.NAMES) - {"cuda"}:
            assert backends.stage(name, backend).__name__ == name
        own = name in cuda.WHY_NOT
        assert own or backends.stage(name, "cuda") is backends.stage(name, "triton")
        assert not own or callable(getattr(cuda, name))
    assert all(backends.stage("refresh_", backend).__name__ == "refresh_" for backend in backends.REFRESH)


def test_resolve_backend():
    assert backends.resolve_backend(True, None) == "cpu"
    assert backends.resolve_backend(False, None) == backends.resolve_backend(False, "reference") == "reference"
    for name in ("cpu", "portable", "reference"):
        assert backends.resolve_backend(True, name) == name


def test_resolve_backend_refuses():
    with pytest.raises(ValueError, match="backend must be .*'portable', 'cpu', 'triton', 'cuda', got 'fastest'"):
        backends.resolve_backend(True, "fastest")
    with pytest.raises(ValueError, match="backend='portable' needs fused=True"):
        backends.resolve_backend(False, "portable")
    with pytest.raises(TypeError, match="fused must be True or False, got 'yes'"):
        backends.resolve_backend("yes", None)


def unbuilt():
    raise ImportError("no nvcc was there")


def test_backends_say_why_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reasons = backends.availability("cpu")
    assert reasons["reference"] is None and reasons["portable"] is None
    assert reasons["triton"].startswith("it serves CUDA tensors only (with TRITON_INTERPRET=1")
    assert reasons["cuda"] == reasons["triton"]  # most of its stages are Triton's
    assert all(backends.availability("meta").values())
    elsewhere = backends.availability("cuda")
    assert elsewhere["cpu"] == "it serves CPU tensors only"
    assert elsewhere["portable"] is None and elsewhere["triton"] is None
    with pytest.raises(ValueError, match="backend='cpu' cannot serve on 'cuda': it serves CPU tensors only"):
        backends.resolve_backend(True, "cpu", "cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot serve on 'cpu': it serves CUDA tensors only"):
        backends.resolve_backend(True, "cuda")
    monkeypatch.setattr("bcl_fast.native.cuda", unbuilt)
    assert backends.why_not("cuda", "cuda") == backends.cuda_library() == "no nvcc was there"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backends.why_not("triton", "cuda") == "Triton is not installed"


def test_float64_on_a_gpu_is_not_served_by_triton_and_says_so():
    backends._fastest.cache_clear()
    assert backends.resolve_backend(True, None, "cuda") in backends.FASTEST["cuda"]
    with pytest.warns(UserWarning, match="'portable' serves, slower than 'triton' would: it computes in float32"):
        assert backends.resolve_backend(True, None, "cuda", torch.float64) == "portable"
    with pytest.raises(ValueError, match="backend='triton' cannot serve on 'cuda': it computes in float32"):
        backends.resolve_backend(True, "triton", "cuda", torch.float64)
    backends._fastest.cache_clear()


def test_on_a_gpu_the_cuda_library_serves_where_it_was_built(monkeypatch):
    for built, expected in ((None, "cuda"), ("no nvcc was there", "triton")):
        monkeypatch.setattr(cuda, "missing", lambda device_type, built=built: built)
        backends._fastest.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # which of the two is faster is not known
            assert backends.resolve_backend(True, None, "cuda") == expected
    backends._fastest.cache_clear()


def test_on_rocm_triton_serves_and_the_cuda_library_does_not(monkeypatch):
    """ROCm's torch calls its devices `cuda`; the library loads there, for it brings NVIDIA's runtime along."""
    monkeypatch.setattr("bcl_fast.native.cuda", lambda: SimpleNamespace(bcl_cuda_on_host=lambda: 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # Triton, wherever these tests run
    assert backends.fastest("cuda") == "cuda" and "sm_90" in backends.tried("cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.fastest("cuda") == "triton" and "gfx942" in backends.tried("cuda")
    assert backends.why_not("cuda", "cuda") == "its CUDA C++ library is for NVIDIA's GPUs, and this torch for AMD's"


def test_where_nothing_is_faster_the_general_backend_serves_without_a_word(monkeypatch):
    for device in ("mps", "xpu", "meta"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.resolve_backend(True, None, device) == backends.fastest(device) == backends.GENERAL
    assert {backends.tried(device) for device in ("mps", "xpu", "npu")} == {"never run"}


def test_within_cuda_sizes_decide_per_stage(monkeypatch):
    came = []
    monkeypatch.setattr(backends, "_function", lambda module, name: lambda *arguments: came.append(module))
    monkeypatch.setattr(backends, "stage", backends.stage.__wrapped__)  # past its cache
    monkeypatch.setitem(cuda.MIN_SIZE, "rank", (B, D))
    for samples, features in ((B, D), (B + 1, D + 1), (B - 1, D), (B, D - 1)):
        backends.stage("rank", "cuda")(torch.ones(samples, features))
    assert came == ["cuda", "cuda", "kernels.selection", "kernels.selection"]


def test_a_missing_library_is_told_once_and_portable_serves(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda device_type: "its C++ library was not built")
    backends._fastest.cache_clear()
    with pytest.warns(UserWarning, match="'portable' serves, slower than 'cpu' would: its C.. library was not built"):
        assert BCLLayer(4, 3).backend == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BCLLayer(4, 3).backend == "portable"
    with pytest.raises(ValueError, match="backend='cpu' cannot serve on 'cpu': its C.. library was not built"):
        BCLLayer(4, 3, backend="cpu")
    backends._fastest.cache_clear()
