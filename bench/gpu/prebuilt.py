"""What a GPU machine need not compile: Triton's cache made without a GPU, and how to tell whether it still holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

KEPT = {".cubin", ".json"}  # of a cached kernel: what its launch needs, a fifth of what its compilation leaves


def triton_key() -> str:
    """Triton's version as its cache sees it: where two machines have the same one they can share a cache."""
    from triton.runtime.cache import triton_key

    return hashlib.sha256(triton_key().encode()).hexdigest()[:16]


# --- Made -------------------------------------------------------------------------------------------------------------


class _StandIn:
    """Triton's driver for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


class _Autocast:
    """torch.autocast for meta tensors, which have none: it only says that it is on."""

    on = False

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, _Autocast.on = _Autocast.on, self.enabled

    def __exit__(self, *error: object) -> None:
        _Autocast.on = self.before


def only_compile(capability: int) -> None:
    """From now on, in this process, launches on meta tensors only compile, for GPUs of this capability (90).

    The path is the JIT's own, so that its cache has what a launch would look for.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    driver.set_active(_StandIn(capability))
    JITFunction.run = lambda self, *arguments, **options: launch(self, *arguments, **options | {"warmup": True})
    torch.autocast = _Autocast
    torch.is_autocast_enabled = lambda device_type=None: _Autocast.on
    torch.get_autocast_dtype = lambda device_type: torch.bfloat16


def counted() -> Counter[str]:
    """Counts from now on, in this process, kernels that are "compiled" and those "found" in the cache."""
    import triton

    counts: Counter[str] = Counter()
    triton.knobs.compilation.listener = lambda **event: counts.update(["found" if event["cache_hit"] else "compiled"])
    return counts


def pruned(cache: Path) -> None:
    """Leave of every cached kernel only what a launch needs."""
    for path in cache.glob("*/*"):
        if path.suffix not in KEPT:
            path.unlink()


# --- Used -------------------------------------------------------------------------------------------------------------


def relocated(cache: Path) -> Path:
    """The cache, usable where it now lies, or a copy where that cannot be written.

    Each kernel has a list of its files by absolute paths; where one of them is missing, the kernel counts as missing.
    """
    if not os.access(cache, os.W_OK):
        cache = Path(shutil.copytree(cache, Path(tempfile.mkdtemp()) / "triton", copy_function=shutil.copyfile))
        for folder in (cache, *cache.iterdir()):
            folder.chmod(0o755)
    for path in cache.glob("*/__grp__*.json"):
        names = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(path.parent.resolve() / name) for name in names if (path.parent / name).exists()}
        path.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
    return cache


def described(folder: Path) -> dict[str, Any]:
    """What bench/prebuild.py wrote about its folder."""
    return json.loads((folder / "prebuilt.json").read_text(encoding="utf-8"))
