"""Bidirectional Competitive Learning for PyTorch: a linear layer whose features compete."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

__version__ = "0.3.0"  # before what writes it down is imported

from .attach import attach_bcl, bind_optimizer, detach_bcl
from .capture import graphed
from .layer import BCLLayer
from .monitor import Monitor
from .spec import PRESETS, BCLConfig

__all__ = ["PRESETS", "BCLConfig", "BCLLayer", "Monitor", "__version__"]
__all__ += ["attach_bcl", "bind_optimizer", "detach_bcl", "graphed"]


def _find_kernels() -> None:
    """Import bcl_fast.kernels from beside this package, where kernels/ lies in a checkout or an editable install."""
    package = Path(__file__).parent
    if not (package / "kernels").is_dir():
        spec = ModuleSpec(__name__ + ".kernels", None, is_package=True)  # no loader: a namespace package
        spec.submodule_search_locations = [str(package.parent / "kernels")]
        sys.modules[spec.name] = globals()["kernels"] = module_from_spec(spec)


_find_kernels()
