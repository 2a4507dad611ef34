"""Who may import whom, read from the source, and what `import bcl_fast` may not need."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bcl_fast.backends import STAGES

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = {"reference", "portable", "kernels", "cpu", "triton", "cuda"}

# Module -> modules of ours it may import. A package has one row for all of its modules.
ALLOWED = {
    "__init__": {"attach", "capture", "layer", "monitor", "spec"},
    "spec": set(),
    "environment": set(),
    "records": set(),
    "rounding": set(),
    "structures": set(),
    "kernels": {"structures", "kernels.bits"},
    "cpu_structs": set(),
    "cuda_structs": {"cpu_structs"},
    "native": {"cpu_structs", "cuda_structs", "private"},
    "norms": {"spec"},
    "losses": {"norms"},
    "projection": {"norms"},
    "reference": {"spec", "norms", "structures"},
    "portable": {"spec", "norms", "structures"},
    "cpu": {"spec", "norms", "native", "cpu_structs", "structures"},
    "triton": {"structures"},
    "cuda": {"cuda_structs", "native", "private", "structures", "triton"},
    "backends": {"spec"},
    "counters": {"backends"},
    "private": set(),
    "owners": {"structures"},
    "operators": {"spec", "backends", "counters", "owners", "private", "projection", "structures"},
    "eager": {"backends", "operators", "structures"},
    "autograd": {"spec", "backends", "operators", "owners", "private", "structures"},
    "checks": set(),
    "transforms": set(),
    "observers": {"reference"},  # the name of a type alone
    "bound": {"spec", "counters", "observers", "operators", "private", "rounding", "state", "structures"},
    "pulls": {"backends", "counters", "eager", "observers", "operators", "owners", "private", "bound", "checks"}
    | {"structures"},
    "state": {"counters", "operators"},
    "layer": {"spec", "backends", "counters", "eager", "observers", "operators", "autograd", "checks", "private"}
    | {"pulls", "reference", "state", "structures", "transforms"},
    "attach": {"spec", "bound", "layer", "pulls", "state", "transforms"},
    "capture": {"spec", "backends", "counters", "operators", "checks", "layer"},
    "diagnostics": {"spec", "norms", "reference"},
    "glance": {"diagnostics", "reference"},
    "meter": {"spec", "attach", "bound", "diagnostics", "layer", "observers", "operators", "private", "reference"},
    "monitor": {"__init__", "spec", "bound", "environment", "glance", "layer", "meter", "records"},
    "integrations": {"spec", "attach", "bound", "layer", "meter", "monitor", "integrations"},
    "testing": {"spec", "reference", "structures"},
    "measure": {"spec", "reference", "capture", "backends", "layer", "structures", "measure"},
    "experiments": {"__init__", "spec", "environment", "attach", "layer", "losses", "diagnostics", "experiments"}
    | {"glance", "monitor", "records"},
    "cli": {"__init__", "environment", "records"},
    "cli_bench": {"cli", "spec", "environment", "records", "measure", "experiments"},
    "__main__": {"__init__", "spec", "environment", "records", "backends", "cli", "cli_bench", "experiments"},
}
ALLOWED_IN_FUNCTIONS = {"backends": BACKENDS}
# Other people's modules: package -> who may import it. "kernels/" may at import time, everybody else in functions.
ONLY_IN = {
    "matplotlib": {"experiments.plots", "experiments.charts"},
    "lightning": {"integrations.lightning"},
    "pytorch_lightning": {"integrations.lightning"},
    "transformers": {"integrations.transformers"},
    "importlib": {"__init__", "environment", "backends", "triton"},
}
DRAWING = {f"experiments.{name}" for name in ("charts", "monitored", "plots", "report")}
# What only a checkout has, with the modules of bench/ by their own names.
NEVER = {"kernels", "tests", "bench", "gpu"} | {path.stem for path in (ROOT / "bench").glob("*.py")}


class Import(NamedTuple):
    """One imported name, absolute: `from .spec import EPS` in bcl_fast/backends.py is bcl_fast.spec."""

    target: str
    line: int
    in_function: bool


def modules() -> dict[str, Path]:
    """Dotted name below bcl_fast -> file, for every module of the package as it is installed."""
    found = {}
    for folder, prefix in ((ROOT / "bcl_fast", ""), (ROOT / "kernels", "kernels.")):
        for path in folder.rglob("*.py"):
            found[prefix + ".".join(path.relative_to(folder).with_suffix("").parts)] = path
    return found


def layer_of(name: str) -> str:
    """The row of ALLOWED that holds a module: the first part of its dotted name."""
    return name.partition(".")[0]


def imports(source: str, name: str, known: set[str]) -> list[Import]:
    """Every import in the source of the module `name`; `known` are the modules and packages below bcl_fast."""
    package = ["bcl_fast", *name.split(".")[:-1]]
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                submodule = f"{base}.{alias.name}".removeprefix("bcl_fast.") in known
                target = f"{base}.{alias.name}" if submodule else base
                found.append(Import(target, node.lineno, in_function))
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(source), False)
    return found


def violations(source: str, name: str, known: set[str]) -> list[str]:
    """What the source of the module `name` imports against the tables above."""
    mine, found = layer_of(name), []
    if mine not in ALLOWED:
        return [f"{name}: a new module; say in ALLOWED what it may import"]
    for target, line, in_function in imports(source, name, known):
        top, _, rest = target.partition(".")
        if top == "bcl_fast":
            other = layer_of(rest or "__init__")
            allowed = ALLOWED[mine] | (ALLOWED_IN_FUNCTIONS.get(mine, set()) if in_function else set())
            wrong = not {other, rest} & allowed
        elif top in ("triton", "matplotlib") and not in_function:
            wrong = name not in ONLY_IN.get(top, ()) and not (top == "triton" and mine == "kernels")
        else:
            wrong = top in NEVER or name not in ONLY_IN.get(top, {name})
        # What imports matplotlib as it is imported must itself be imported inside functions.
        draws = target.removeprefix("bcl_fast.") in DRAWING and name not in DRAWING and not in_function
        if wrong or draws:
            found.append(f"{name}, line {line}: {target}{' inside a function' if in_function else ''}")
    return found


MODULES = modules()
PACKAGES = {name.rpartition(".")[0] for name in MODULES} - {""}


def test_a_module_imports_only_what_is_below_it():
    known = set(MODULES) | PACKAGES
    texts = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    found = {name: violations(text, name, known) for name, text in texts.items()}
    assert len(found) > 50 and {name: those for name, those in found.items() if those} == {}


@pytest.mark.parametrize(
    "name, source",
    [
        ("spec", "from .reference import rank"),
        ("spec", "import bcl_fast.reference"),
        ("reference", "from bcl_fast.kernels import competition"),
        ("kernels.competition", "from ..backends import stage"),
        ("kernels.competition", "from .selection import selection"),
        ("layer", "def f():\n    from . import portable"),
        ("layer", "import bcl_fast"),
        ("backends", "from . import reference"),
        ("backends", "if True:\n    from .portable import rank"),
        ("backends", "def f():\n    from .native import load"),
        ("backends", "import triton"),
        ("portable", "import importlib"),
        ("experiments.run", "from matplotlib import pyplot"),
        ("experiments.run", "from .plots import draw"),
        ("experiments.run", "from ..backends import stage"),
        ("__main__", "from .experiments import plots"),
        ("experiments.sweep", "from .report import write_report"),
        ("measure", "from bench.stages import sizes"),
        ("measure", "import tests"),
        ("measure.steps", "def f():\n    from stages import check_stages"),
        ("backends", "def f():\n    import kernels.competition"),
        ("helpers", ""),
    ],
)
def test_the_check_sees(name, source):
    known = {"kernels.competition", "kernels.selection", "reference", "portable", "experiments", "experiments.plots"}
    assert violations(source, name, known)


@pytest.mark.parametrize(
    "name, source",
    [
        ("backends", "def f():\n    from . import reference\n    from .kernels import competition\n    import triton"),
        ("kernels.competition", "import triton\nimport triton.language as tl\nimport torch"),
        (
            "experiments.plots",
            "from matplotlib import pyplot\nfrom .model import Autoencoder\nfrom ..layer import BCLLayer",
        ),
        ("experiments.run", "def f():\n    from .plots import draw"),
        ("__main__", "from . import __version__, backends"),
    ],
)
def test_the_check_allows(name, source):
    known = {"kernels.competition", "kernels", "reference", "backends", "experiments.plots"}
    assert violations(source, name, known) == []


def test_every_stage_has_a_kernel_file():
    """And every backend a row of what it may import."""
    assert {f"kernels.{name}" for name in STAGES.values()} <= modules().keys()
    assert BACKENDS <= ALLOWED.keys()


def test_private_functions_of_torch_have_one_home():
    private = re.compile(r"torch\.(?!__)(\w+\.)*_[a-zA-Z]|\._(post_accumulate_grad_hooks|execution_engine)")
    assert private.search("torch._C._functorch.peek()") and private.search("weight._post_accumulate_grad_hooks")
    for name, path in modules().items():
        found = private.search(path.read_text(encoding="utf-8"))
        assert (found is None) or name == "private", f"{name}: {found[0]}"


def test_nothing_imports_the_bare_name_kernels():
    files = [ROOT / "setup.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    for path in files:
        found = imports(path.read_text(encoding="utf-8"), path.stem, set())
        assert [i for i in found if i.target.split(".")[0] == "kernels"] == [], path


COLD = """
import sys

blocked = ["triton", "matplotlib", "typer", "rich", "sklearn", "torchvision", "tensorboard"]
sys.modules.update(dict.fromkeys(blocked))  # None: importing it is an ImportError
import torch
import bcl_fast

layer = bcl_fast.BCLLayer(6, 4)
layer(torch.randn(5, 6)).sum().backward()
assert int(layer.step) == 1
assert all(sys.modules[name] is None for name in blocked)
"""


def test_importing_and_training_need_torch_alone():
    subprocess.run([sys.executable, "-c", COLD], cwd=ROOT, check=True)


def test_importing_brings_no_optional_module():
    code = "import sys, torch; before = set(sys.modules); import bcl_fast; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    brought = {name.partition(".")[0] for name in done.stdout.split()}
    assert "bcl_fast" in brought
    assert brought <= {"bcl_fast", "torch", "_weakref"} | set(sys.stdlib_module_names)
