"""Variants: the launch sizes in use, and their rivals, one changed at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bcl_fast import backends, cuda

IN_USE = "in use"  # what a variant without changes is called
# Stage of Triton -> constant of its file in kernels/ -> what to try instead.
RIVALS: dict[str, dict[str, tuple[Any, ...]]] = {
    # Wide programs serve every size that is timed here; without a limit to the cache the usual ones do.
    "competition": {
        "WIDE": ((132, 128, 16), (264, 64, 8)),
        "CACHE": (1 << 40,),
        "STAGES": (1, 2),
        "FORCES": ((32, 64),),
    },
    "selection": {"PROGRAMS": (132, 528), "COLUMNS": (2,), "RUN": (512,), "BLOCK": (256,), "MAX_RUNS": (4,)},
    "neighbors": {"FEW": ((16, 64, 32, 8), (64, 64, 16, 8)), "MANY": ((16, 128, 16, 8), (128, 64, 16, 8))},
    "targets_pull_": {"GATHER": (4, 16), "MAX_BLOCK_N": (64, 256), "CHUNK_ROWS": (64,)},
    "gradient": {"TILE": (1024, 4096), "PROGRAMS": (512, 2048)},
}


@dataclass(frozen=True)
class Variant:
    """A stage of a backend, with some of its launch sizes changed."""

    backend: str
    stage: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.changes.items()) or IN_USE


def variants(backend: str, stage: str) -> list[Variant]:
    """What is in use, first, and every rival of it; for `cuda` these are all forms that are compiled."""
    if backend == "triton":
        changes = [{name: value} for name, values in RIVALS.get(stage, {}).items() for value in values]
    else:
        used = sizes(backend, stage)
        changes = [form for form in cuda.FORMS[stage] if {**used, **form} != used]
    return [Variant(backend, stage, change) for change in [{}, *changes]]


def stages(backend: str) -> tuple[str, ...]:
    """The stages of a backend that have rivals."""
    return tuple(RIVALS if backend == "triton" else (name for name, forms in cuda.FORMS.items() if len(forms) > 1))


def sizes(backend: str, stage: str) -> dict[str, Any]:
    """The table that the launcher of a stage reads at every call."""
    return cuda.LAUNCH[stage] if backend == "cuda" else vars(sys.modules[backends.stage(stage, "triton").__module__])


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Within this block the stage is launched so."""
    table = sizes(variant.backend, variant.stage)
    before = {name: table[name] for name in variant.changes}
    table.update(variant.changes)
    try:
        yield
    finally:
        table.update(before)
