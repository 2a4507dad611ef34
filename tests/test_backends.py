"""Which backends there are, which stages each serves, and which of them serves a layer."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.operators import B, D
from stages import stage_calls
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bcl_fast import BCLLayer, backends, cpu, cuda
from bcl_fast.measure.implementations import Size


def test_every_backend_serves_every_stage():
    for name in backends.STAGES:
        for backend in set(backends.NAMES) - {"cuda"}:
            assert backends.stage(name, backend).__name__ == name
        own = name in cuda.DECLINES
        assert own or backends.stage(name, "cuda") is backends.stage(name, "triton")
        assert not own or callable(getattr(cuda, name))
    assert all(backends.stage("refresh_", backend).__name__ == "refresh_" for backend in backends.REFRESH)


def test_every_backend_says_which_calls_it_serves(monkeypatch):
    """That it keeps the contract there is test_stages' subject."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cuda, "library", lambda device_type: None)
    calls = stage_calls(Size(13, 7, 5), like="reference")
    calls["targets"] = calls["targets_pull_"][3:]
    assert calls.keys() == backends.STAGES.keys()

    def reasons(name, **to):
        moved = tree_map_only(
            Tensor, lambda tensor: tensor.to(**to) if tensor.is_floating_point() else tensor, calls[name]
        )
        return {backend: backends.why_not_stage(name, backend, moved) for backend in backends.NAMES}

    for name in calls:
        triton_s = None if name in cuda.DECLINES else "the stage is Triton's"
        assert reasons(name) == dict.fromkeys(backends.NAMES) | {"cuda": triton_s}
        double = reasons(name, dtype=torch.float64)
        assert double["reference"] is double["portable"] is double["cpu"] is None
        assert double["triton"].startswith("it computes in float32")
        assert double["cuda"] == (triton_s or "it computes in float32, not in torch.float64")
        assert reasons(name, dtype=torch.half)["cpu"] == "it computes in float32 and float64, not in torch.float16"
        nowhere = reasons(name, device="meta")
        assert nowhere["reference"] == nowhere["portable"] == "meta tensors hold no numbers" and all(nowhere.values())
    by_cosine = [*calls["selection"][:5], "cosine", "hard", 5]
    assert backends.why_not_stage("selection", "cuda", by_cosine) == "it selects by rank alone, not by cosine"
    with pytest.raises(TypeError, match="cannot run the stage rank: it computes in .* not in torch.float16"):
        cpu.rank(torch.ones(3, 2, dtype=torch.half))


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
    nowhere = backends.availability("meta")
    assert all(nowhere.values()) and nowhere["reference"] == nowhere["portable"] == "meta tensors hold no numbers"
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
        monkeypatch.setattr(cuda, "missing", lambda *_, built=built: built)
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
    monkeypatch.setattr(cpu, "missing", lambda *_: "its C++ library was not built")
    backends._fastest.cache_clear()
    with pytest.warns(UserWarning, match="'portable' serves, slower than 'cpu' would: its C.. library was not built"):
        assert BCLLayer(4, 3).backend == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BCLLayer(4, 3).backend == "portable"
    with pytest.raises(ValueError, match="backend='cpu' cannot serve on 'cpu': its C.. library was not built"):
        BCLLayer(4, 3, backend="cpu")
    backends._fastest.cache_clear()
