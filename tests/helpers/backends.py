"""Which backends a test runs on, and where: on the GPU if there is one, else on the CPU.

There Triton interprets, and the CUDA kernels run on the host (helpers/cuda_host.py).
"""

import os
import sys

import pytest
import torch
from torch.utils._pytree import tree_map_only

from bcl_fast import backends, cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # decided by conftest.py
DEVICE = {name: "cuda" if name in backends.ON_GPU and torch.cuda.is_available() else "cpu" for name in backends.NAMES}
SLOW = set(backends.ON_GPU) if INTERPRETED else set()  # seconds for what the others do in milliseconds
ON_CPU = [name for name in backends.NAMES if backends.why_not(name, "cpu") is None and name not in SLOW]


def candidates(dtype=torch.float32, sizes=(None,), most=1 << 12, stage=None):
    """(backend, size) for every backend but the reference that serves this dtype here and has a stage of its own.

    A slow one gets the sizes (B, D, N) of at most `most` elements [B, D].
    """
    return [
        (name, size)
        for name, device in DEVICE.items()
        for size in sizes
        if name != "reference" and backends.why_not(name, device, dtype) is None
        if name not in SLOW or size is None or size[0] * size[1] <= most
        if name != "cuda" or stage is None or stage in cuda.DECLINES
    ]


def over_backends(slow=True, **options):
    """Parametrize a test over `backend`; the options are those of `candidates`."""
    names = [name for name, _ in candidates(**options) if slow or name not in SLOW]
    return pytest.mark.parametrize("backend", names)


def stage(name, backend, beside=None):
    """The function of a stage, or one `beside` it, for CPU tensors whatever its device; in-place changes come back."""
    function = backends.stage(beside or name, backend)
    if beside:
        function = getattr(sys.modules[function.__module__], name)
    device = DEVICE[backend]
    if device == "cpu":
        return function

    def there_and_back(*arguments):
        moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)
        results = function(*moved)
        for ours, theirs in zip(arguments, moved, strict=True):
            if torch.is_tensor(ours) and not ours.equal(theirs.cpu()):
                ours.copy_(theirs)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, results)

    return there_and_back
