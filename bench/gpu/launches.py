"""Launches: which kernels a step is made of, and what each takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch


def kernels(step: Callable[[], Any], device: str = "cpu", steps: int = 3) -> dict[str, tuple[float, float]]:
    """Kernel -> its milliseconds and launches in a step, the longest first; on a CPU torch's operations."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type == kind:
            found[event.name].append(event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {name: (sum(us) / steps / 1e3, len(us) / steps) for name, us in longest}
