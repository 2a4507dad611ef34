"""Every kernel compiles for GPUs that are not here exactly as its launchers launch it, without spills, and it fits.

A process that interprets Triton cannot compile, so a child does: it runs this file as a program. The launchers get
tensors without storage, which cost nothing at any size, and what they would have launched is compiled.
"""

import ast
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers.cubin import resources
from helpers.interpreter import Launch, Launches

from bcl_fast.structures import Pull

ROOT = Path(__file__).resolve().parents[1]


class Target(NamedTuple):
    backend: str
    arch: int | str
    warp_size: int
    shared: int  # bytes that one program can have


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}


# --- The launchers, and arguments for them ---------------------------------------------------------------------------


class Sizes(NamedTuple):
    B: int
    D: int
    N: int
    k: int = 8
    r: int = 5
    dtype: torch.dtype = torch.float32  # of x, of the weight as the neighbors see it, of the incoming gradient


PRODUCT = {"cuda": "tf32x3", "hip": "ieee"}  # kernels.neighbors chooses it by torch, which is of one of the two


# Launch sizes follow from D, N, k and r, a few from the size of B; integers above 2^31 are another type.
SIZES = [
    Sizes(128, 64, 784),
    Sizes(1000, 777, 501, dtype=torch.bfloat16),
    Sizes(8192, 8192, 784),
    Sizes(65536, 16384, 784, dtype=torch.bfloat16),
    Sizes(16384, 65536, 1024),
    Sizes(300, 129, 65, k=100, r=32),
    Sizes(7, 2, 1, k=1),
]
BATCHES = (1, 2, 15, 16, 100, 128, 1000, 4096, 50000, 65536)


def arguments(sizes: Sizes, device: str = "meta") -> SimpleNamespace:
    """Arguments for every launcher under their names in SPEC.md; each tensor has its own storage."""
    B, D, N, k, r, dtype = sizes

    def real(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(shape, dtype=dtype, device=device)

    def following(rows: int, columns: int, bound: int) -> torch.Tensor:
        """[rows, columns] indices below `bound`: in row i those that follow i."""
        return (torch.arange(rows, device=device)[:, None] + 1 + torch.arange(columns, device=device)) % bound

    def number(value: int) -> torch.Tensor:
        return torch.full((), value, dtype=torch.int64, device=device)

    neighbors, winner = following(D, min(k, D - 1), D), torch.randint(D, (B,), device=device)
    return SimpleNamespace(
        neighborhood_k=k,
        rescue_k=r,
        x=real(B, N, dtype=dtype),
        weight=real(D, N),
        weight_as_used=real(D, N, dtype=dtype),
        offset=real(D, N),
        bias=real(D),
        activation=real(B, D),
        similarity=real(min(D, 64), D),
        neighbors=neighbors,
        winner=winner,
        x_inverse_norm=real(B),
        weight_inverse_norm=real(D),
        need=real(B),
        pair_feature=neighbors[winner],
        pair_pull=real(B, neighbors.shape[1]),
        rescue_rows=following(D, min(r, B), B),
        rescue_weight=real(D, min(r, B)),
        winner_share=real(D),
        som_strength=real(D),
        som_lr=torch.full((), 0.1, device=device),
        grad_output=real(B, D, dtype=dtype),
        mask=real(B, D),
        step=number(50),
        never=number(-1),
    )


Call = Callable[[ModuleType, SimpleNamespace], Any]  # of a kernel file and the arguments


def selection(rule: str, weighting: str) -> Call:
    return lambda m, a: m.selection(
        a.activation, a.bias, a.x_inverse_norm, a.weight_inverse_norm, a.need, rule, weighting, a.rescue_k
    )


def pull(a: SimpleNamespace) -> Pull:
    return Pull(**{name: getattr(a, name) for name in Pull._fields})


# Stage -> calls that together launch every kernel of its file in every form.
CALLS: dict[str, dict[str, Call]] = {
    "inverse_norm": {"x": lambda m, a: m.inverse_norm(a.x)},
    "neighbors": {
        "all": lambda m, a: m.neighbors(a.weight_as_used, a.neighborhood_k),
        "refresh": lambda m, a: m.refresh_(a.weight_as_used, a.neighbors, a.step, a.never, 50),
        "panel": lambda m, a: m.nearest(a.similarity, 0, a.neighborhood_k),
    },
    "competition": {
        "decoupled": lambda m, a: m.competition(a.activation, a.neighbors, 5.0, a.x, "decoupled", 0.0, 0.0),
        "coupled": lambda m, a: m.competition(a.activation, a.neighbors, 5.0, a.x, "coupled", 0.3, 0.3),
    },
    "selection": {
        "rank": selection("rank", "hard"),
        "rank-soft": selection("rank", "soft"),
        "clamped": selection("clamped_cosine", "hard"),
        "cosine-soft": selection("cosine", "soft"),
        "rank-bare": lambda m, a: m.selection(
            a.activation, None, a.x_inverse_norm, None, None, "rank", "hard", a.rescue_k
        ),
        "ranks": lambda m, a: m.rank(a.activation),
    },
    "targets_pull": {
        "targets": lambda m, a: m.targets(pull(a)),
        "weight": lambda m, a: m.targets_pull_(a.weight, None, a.som_lr, pull(a), a.step),
        "offset": lambda m, a: m.targets_pull_(a.weight, a.offset, a.som_lr, pull(a), None),
    },
    "gradient": {
        "mask": lambda m, a: m.gradient(a.grad_output, a.mask, None, a.mask),
        "winner": lambda m, a: m.gradient(a.grad_output, None, a.winner),
        "none": lambda m, a: m.gradient(a.grad_output, None, None),
    },
}


# rank-soft does everything that these two do, and takes as many registers on every target (on gfx942 one fewer than
# rank-bare). Their forms for many samples take up to 13 s each to compile: one target compiles them, once.
LESS = {("selection", "rank"), ("selection", "rank-bare")}
EVERY_CALL = [(stage, call) for stage, calls in CALLS.items() for call in calls]


def run(stage: str, call: str, given: SimpleNamespace) -> Any:
    return CALLS[stage][call](importlib.import_module(f"bcl_fast.kernels.{stage}"), given)


def stages() -> list[str]:
    """Every kernel file but bits.py, of which they all are made."""
    return sorted({path.stem for path in (ROOT / "kernels").glob("*.py")} - {"bits"})


def kernel_names() -> list[str]:
    """Every @triton.jit function named `_*_kernel`, read from the source."""
    trees = [ast.parse((ROOT / "kernels" / f"{stage}.py").read_text(encoding="utf-8")) for stage in stages()]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    jitted = [
        function.name for function in functions if "triton.jit" in "".join(map(ast.unparse, function.decorator_list))
    ]
    return [name for name in jitted if re.fullmatch(r"_\w+_kernel", name)]


def launches(stage: str, call: str, sizes: Sizes) -> list[Launch]:
    """What a call would launch: its tensors have no storage, so that any size costs nothing."""
    with Launches(execute=False) as recorded:
        run(stage, call, arguments(sizes))
    return recorded


# --- The child: Triton compiles only where it does not interpret -----------------------------------------------------


class Source(NamedTuple):
    """What Triton compiles: a launch less what does not change the code."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]


def source(launch: Launch, general: bool) -> Source:
    """A launch as Triton's own would specialize it; `general`: as one of odd sizes and any strides.

    It writes an integer 1 into the code, and remembers of others and of pointers that 16 divides them: those of torch's
    allocator are.
    """
    signature, constants, attributes = dict(launch.types), {}, {}
    for place, parameter in enumerate(launch.function.params):
        kind, value = signature[parameter.name], launch.values.get(parameter.name)
        special = kind[0] in "iu" and not general and not parameter.do_not_specialize
        if kind == "constexpr" or (special and value == 1):
            signature[parameter.name], constants[place,] = "constexpr", value
        elif kind[0] == "*" or (special and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return Source(signature, constants, attributes, launch.options)


def usage(compiled: Any, target: Target) -> dict[str, int]:
    """Registers of a thread, bytes it spills and bytes of shared memory, read from the binary; how it multiplies."""
    import triton

    shared = compiled.metadata.shared
    if target.backend == "hip":
        # Scalar registers that do not suffice go to lanes of a vector register, not to memory.
        said = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
        return dict(registers=int(said["vgpr_count"]), spills=4 * int(said["vgpr_spill_count"]), shared=shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((registers, spills),) = resources(triton.knobs.nvidia.cuobjdump.path, file.name).values()
    return dict(
        registers=registers,
        spills=spills,
        shared=shared,
        tensor_cores=len(re.findall(r"mma\S*tf32", compiled.asm["ptx"])),
        multiply_adds=len(re.findall(r"\bfma\.rn\.f32", compiled.asm["ptx"])),
    )


def compiled(launch: Launch, new: Source, target: Target) -> dict[str, Any]:
    """What the kernel takes, or the error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        place: PRODUCT[target.backend] if launch.function.params[place[0]].name == "PRODUCT" else value
        for place, value in new.constants.items()
    }
    try:
        code = ASTSource(launch.function, new.signature, constants, new.attributes)
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        return usage(triton.compile(code, target=gpu, options=new.options), target)
    except Exception as error:  # the test of this kernel and target fails with it
        return dict(error=f"{type(error).__name__}: {error}")


def compile_all(targets: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each kernel, form in which it is launched, and target.

    What is written into the code makes a form for every target; of other types of arguments, and as Triton specializes
    it for their values, sm_90 stands for all; and for the calls of LESS.
    """
    rows, known, forms = [], set(), set()
    for sizes, (stage, call) in itertools.product(SIZES, EVERY_CALL):
        less = (stage, call) in LESS
        for launch, general in itertools.product(launches(stage, call, sizes), (True,) if less else (True, False)):
            new = source(launch, general)
            if (launch.name, str(new)) in known:
                continue
            known.add((launch.name, str(new)))
            form = launch.name, str(new.constants), str(new.options)
            everywhere = general and not less and form not in forms
            forms.add(form)
            for target in targets if everywhere else {"sm_90"}.intersection(targets):
                row = dict(kernel=launch.name, target=target, call=f"{stage}-{call}", sizes=str(sizes), source=str(new))
                rows.append(row | compiled(launch, new, TARGETS[target]))
    return rows


def forms_by_batch() -> dict[str, int]:
    """Call and kernel -> in how many forms it is compiled as the batch alone varies."""
    forms: dict[str, set[str]] = defaultdict(set)
    for batch, (stage, call) in itertools.product(BATCHES, EVERY_CALL):
        for launch in launches(stage, call, Sizes(batch, 777, 501)):
            forms[f"{stage}-{call} {launch.name}"].add(str(source(launch, general=False)))
    return {name: len(different) for name, different in forms.items()}


# --- The parent ------------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """What two children say, one of sm_90, which has as many forms as the others together: it takes minutes."""
    folder = tmp_path_factory.mktemp("ahead_of_time")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    children = {}
    for half in (["sm_90"], [name for name in TARGETS if name != "sm_90"]):
        path = folder / f"{'-'.join(half)}.json"
        command = [sys.executable, __file__, str(path), *half]
        children[path] = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    errors = [child.communicate()[1] for child in children.values()]
    assert not any(child.returncode for child in children.values()), errors
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in children]
    return dict(compiled=[row for part in parts for row in part["compiled"]], forms=parts[0]["forms"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", kernel_names())
def test_compiles_without_spills_and_fits(report, kernel, target):
    rows = [row for row in report["compiled"] if (row["kernel"], row["target"]) == (kernel, target)]
    assert rows, "no call in CALLS launches it"
    for row in rows:
        assert "error" not in row, row
        assert row["spills"] == 0, row
        assert row["shared"] <= TARGETS[target].shared, row


@pytest.mark.parametrize("target", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_the_refresh_multiplies_on_tensor_cores(report, target):
    """In float32 its product would be 128 multiply-adds of every thread or more; the norms' squares alone are left."""
    rows = [row for row in report["compiled"] if (row["kernel"], row["target"]) == ("_neighbors_kernel", target)]
    assert rows
    for row in rows:
        assert row["tensor_cores"] > 0 and row["multiply_adds"] < 64, row


def test_no_kernel_is_compiled_anew_for_every_batch(report):
    """A last tile, a split or 64-bit sizes may bring another form; a form for each size of batch may not come."""
    assert {name: forms for name, forms in report["forms"].items() if forms > 3} == {}


def test_every_kernel_file_has_calls(report):
    assert sorted(CALLS) == stages()
    print(table(report["compiled"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The largest registers / spilled bytes / shared memory of each kernel on each target."""
    lines = [f"{'registers/spills/shared':28}" + "".join(f"{target:>18}" for target in TARGETS)]
    for kernel in sorted({row["kernel"] for row in rows}):
        cells = []
        for target in TARGETS:
            mine = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target) and "error" not in row]
            most = [max((row[key] for row in mine), default="?") for key in ("registers", "spills", "shared")]
            cells.append(f"{'/'.join(map(str, most)):>18}")
        lines.append(f"{kernel:28}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    result = dict(compiled=compile_all(sys.argv[2:]), forms=forms_by_batch())
    Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")
