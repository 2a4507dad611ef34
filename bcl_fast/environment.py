"""Where a number comes from: interpreter, libraries, processor, threads, devices."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
    except OSError:
        names = set()
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """The devices that torch can compute on here: name ("cpu", "cuda:0", ...) -> model."""
    found = {"cpu": _processor()}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        describe = getattr(module, "get_device_name", lambda index: accelerator.type)
        found |= {f"{accelerator.type}:{i}": describe(i) for i in range(torch.accelerator.device_count())}
    return found


def device_types() -> tuple[str, ...]:
    """The types of those devices ("cpu", "cuda", ...), each once."""
    return tuple(dict.fromkeys(name.partition(":")[0] for name in devices()))


def built_for() -> str | None:
    """The type of device that torch was built for besides the CPU, whether there is one here or not."""
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else accelerator.type


def environment() -> dict[str, Any]:
    """What a measurement depends on besides the code, as plain values for a JSON record."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": devices(),
    }
