"""Calls of the C++ library's stages, with what the reference makes of them, for a program without torch to repeat.

`tests/replay/replay.cpp` reads what `write` writes. A case is a stage, a label, a dtype, and every field of the stage's
struct: a number, None, a tensor that the stage reads, or a `Result`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bcl_fast import cpu
from bcl_fast import reference as ref
from bcl_fast.structures import Pull
from bcl_fast.testing import COLUMNS, columns, compete, neighbors_of, octave_needs

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "replay" / "replay.cpp"
MAGIC = 0x314C504552434200
BUDGET, SHARES = 1e-5, 1e-6  # as in tests/test_cpu.py
B, D, N = 1009, 19, 33  # four histograms, several tiles, a rest of every vector width


class Result(NamedTuple):
    """What a stage writes."""

    right: Tensor
    budget: float = -1.0  # of max |value - right| / max |right|; negative: equal
    before: Tensor | None = None  # what the memory holds, where the stage reads it
    judged: bool = True


class Case(NamedTuple):
    stage: str
    label: str
    dtype: torch.dtype
    fields: dict[str, Any]

    def wrong(self, field: str, nan: bool = False) -> Case:
        """The same with one number of an expectation changed: an index by one, else by a thousandth of the largest."""
        result = self.fields[field]
        right = result.right.clone()
        if nan:
            right.view(-1)[0] = torch.nan
        else:
            right.view(-1)[-1] += right.abs().max() / 1000 if right.is_floating_point() else 1
        return self._replace(fields=self.fields | {field: result._replace(right=right)})


# --- The file ---------------------------------------------------------------------------------------------------------


def _array(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return b"q" + struct.pack("<Q", 0)
    element = {torch.int64: b"q", torch.float32: b"f", torch.float64: b"d"}[tensor.dtype]
    return element + struct.pack("<Q", tensor.numel()) + tensor.contiguous().numpy().tobytes()


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _field(value: Any) -> bytes:
    if value is None:
        return b"0"
    if isinstance(value, Tensor):
        return b"a" + _array(value)
    if isinstance(value, Result):
        kind = b"o" if value.judged else b"u"
        return kind + struct.pack("<d", value.budget) + _array(value.before) + _array(value.right)
    return b"d" + struct.pack("<d", value) if isinstance(value, float) else b"i" + struct.pack("<q", value)


def write(path: Path, cases: list[Case]) -> Path:
    """Write the file that the program reads."""
    parts = [struct.pack("<QQ", MAGIC, len(cases))]
    for stage, label, dtype, fields in cases:
        wide = b"d" if dtype == torch.float64 else b"f"
        parts += [_text(stage), _text(label), wide, struct.pack("<Q", len(fields))]
        parts += [_text(name) + _field(value) for name, value in fields.items()]
    path.write_bytes(b"".join(parts))
    return path


# --- The program ------------------------------------------------------------------------------------------------------

SETUP = """
import json, runpy, setuptools
setuptools.setup = lambda **options: None
library = runpy.run_path("setup.py")["CPU"]
print(json.dumps([library.extra_compile_args, library.sources]))
"""


def build(compiler: str, *words: str) -> Path:
    """The program, linked with the library's sources and compiled with the flags of setup.py, unless it is there."""
    environment = os.environ | {"BCL_FAST_EXT": "cpu"}
    said = subprocess.run([sys.executable, "-c", SETUP], cwd=ROOT, env=environment, capture_output=True, check=True)
    flags, sources = json.loads(said.stdout)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    command = [compiler, *flags, "-fopenmp", "-Wall", "-Wextra", *words, *sources, str(SOURCE)]
    texts = [path.read_text(encoding="utf-8") for path in (SOURCE, *sorted((ROOT / "csrc" / "cpu").iterdir()))]
    target = ROOT / "build" / f"replay-{hashlib.sha256(repr((command, version, texts)).encode()).hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], cwd=ROOT, check=True)
        os.replace(partial, target)
    return target


# --- The cases --------------------------------------------------------------------------------------------------------


def uniform(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _apart(matrix: Tensor) -> Tensor:
    """The same rows, three elements of NaN behind each: what no stage may take for a number."""
    return torch.nn.functional.pad(matrix, (0, 3), value=torch.nan)


def selection(
    label: str,
    activation: Tensor,
    need: Tensor | None,
    rule: str = "rank",
    weighting: str = "hard",
    rescue_k: int = 5,
    bias: Tensor | None = None,
) -> Case:
    (rows, features), dtype = activation.shape, activation.dtype
    rinv, winv = uniform(rows, 2, dtype) + 0.1, uniform(features, 3, dtype) + 0.1
    chosen, shares = ref.selection(activation, bias, rinv, winv, need, rule, weighting, rescue_k)
    order = chosen.argsort(dim=1)
    label = f"{label}, {rule}, {weighting}, {rescue_k} of {rows}{'' if need is None else ', need'}"
    given = dict(activation=_apart(activation), bias=bias, x_inverse_norm=rinv)
    given |= dict(weight_inverse_norm=None if rule == "rank" else winv, need=need)
    results = dict(rows=Result(chosen.gather(1, order)), shares=Result(shares.gather(1, order), SHARES))
    sizes = dict(stride=features + 3, B=rows, D=features, r=chosen.shape[1])
    return Case(
        "selection", label, dtype, given | results | sizes | dict(rule=cpu.RULES[rule], soft=weighting == "soft")
    )


def competition(label: str, activation: Tensor, k: int, smooth: bool = True, **options: Any) -> Case:
    """`smooth`: whether all results are judged, or choices alone."""
    (rows, features), near = activation.shape, neighbors_of(activation.shape[1], k)
    options = dict(temperature=5.0, forces="decoupled", rescue_onset=0.0, pull_onset=0.0) | options
    x = columns("random", rows, N, activation.dtype, seed=7)
    found = compete(ref.competition, activation, near, x=x, **options)._asdict()
    results = {
        name: Result(right) if right.dtype == torch.int64 else Result(right, BUDGET, judged=smooth)
        for name, right in found.items()
    }
    given = dict(activation=_apart(activation), neighbors=near, x=x)
    sizes = dict(activation_stride=features + 3, x_stride=N, B=rows, D=features, N=N, k=near.shape[1])
    coupled = options.pop("forces") == "coupled"
    return Case(
        "competition", f"{label}, k {k}", activation.dtype, given | results | sizes | options | {"coupled": coupled}
    )


def neighbors(label: str, similarity: Tensor, k: int, first: int = 0) -> Case:
    """Of features `first` and later, from their rows of similarity [D, D]."""
    near = ref.nearest(similarity, k)[first:]
    (rows, k), features, dtype = near.shape, similarity.shape[1], similarity.dtype
    fields = dict(similarity=_apart(similarity[first:]), column_near=None, column_best=None) | _lists(
        "row", near, dtype
    )
    sizes = dict(stride=features + 3, rows=rows, columns=features, first_row=first, first_column=0, k=k)
    return Case("neighbors", f"{label}, k {k}, from {first}", dtype, fields | sizes)


def neighbors_of_both(label: str, similarity: Tensor, k: int, first: int) -> Case:
    """Of the first features among the others, and of the others among the first: similarity [first, D - first]."""
    shape = similarity.shape
    across = torch.full((sum(shape), sum(shape)), -torch.inf, dtype=similarity.dtype)
    across[:first, first:], across[first:, :first] = similarity, similarity.T
    near = ref.nearest(across, k)
    fields = dict(similarity=_apart(similarity)) | _lists("row", near[:first], similarity.dtype)
    fields |= _lists("column", near[first:], similarity.dtype)
    sizes = dict(stride=shape[1] + 3, rows=shape[0], columns=shape[1], first_row=0, first_column=first, k=k)
    return Case("neighbors", f"{label}, of both, k {k}", similarity.dtype, fields | sizes)


def _lists(side: str, near: Tensor, dtype: torch.dtype) -> dict[str, Result]:
    """The lists of the rows or columns of a tile, as they begin and as they must end."""
    nobody = torch.full_like(near, torch.iinfo(torch.int64).max)
    best = torch.full(near.shape, -torch.inf, dtype=dtype)
    return {f"{side}_near": Result(near, before=nobody), f"{side}_best": Result(best, before=best, judged=False)}


def rank(label: str, key: Tensor) -> Case:
    fields = dict(key=_apart(key), rank=Result(ref.rank(key)), stride=key.shape[1] + 3, B=key.shape[0], D=key.shape[1])
    return Case("rank", label, key.dtype, fields)


def inverse_norm(label: str, rows: Tensor) -> Case:
    fields = dict(rows=_apart(rows), inverse=Result(ref.inverse_norm(rows), BUDGET))
    return Case(
        "inverse_norm", label, rows.dtype, fields | dict(stride=rows.shape[1] + 3, R=rows.shape[0], N=rows.shape[1])
    )


def gradient(label: str, gradient: Tensor, mask: Tensor) -> Case:
    masked, total = ref.gradient(gradient, mask, None)
    fields = dict(gradient=_apart(gradient), mask=mask, masked=Result(masked), sum=Result(total, BUDGET))
    sizes = dict(stride=gradient.shape[1] + 3, B=gradient.shape[0], D=gradient.shape[1])
    return Case("gradient", label, gradient.dtype, fields | sizes)


def targets(label: str, dtype: torch.dtype, pulled: bool, offset: bool) -> Case:
    """som_target, or what a pull leaves of the weight or of the offset."""
    activation, x, near = columns("random", B, D, dtype), columns("random", B, N, dtype, 1), neighbors_of(D, 8)
    won = compete(ref.competition, activation, near, x=x)
    rows, shares = ref.selection(activation, None, won.x_inverse_norm, None, won.need, "rank", "soft", 5)
    pull = Pull(x, won.pair_feature, won.pair_pull, rows, shares, won.winner_share, won.som_strength)
    weight, beside = columns("random", D, N, dtype, 2), columns("random", D, N, dtype, 3) if offset else None
    before = (weight if beside is None else beside) if pulled else None
    if before is None:
        right = ref.targets(pull)
    else:
        after = weight.clone(), None if beside is None else beside.clone()
        ref.targets_pull_(*after, torch.tensor(0.5, dtype=dtype), pull)
        right = after[1] if offset else after[0]
    fields = pull._asdict() | dict(weight=weight if pulled else None, offset=beside)
    fields |= dict(destination=Result(right, BUDGET, before), x_stride=N, B=B, D=D, N=N, k=8, r=5, som_lr=0.5)
    return Case("targets", label, dtype, fields)


def _selections(dtype: torch.dtype) -> Iterator[Case]:
    need, bias = uniform(B, 1, dtype) / 20 + 0.02, uniform(D, 4, dtype)
    for kind in COLUMNS:
        activation = columns(kind, B, D, dtype)
        yield selection(kind, activation, octave_needs(B, dtype) if kind == "octaves" else need)
        yield selection(kind, activation, need, weighting="soft", bias=bias)
        yield selection(kind, activation, None)
    for kind in ("random", "quantized", "signed_zeros"):
        for rule in ("cosine", "clamped_cosine"):
            yield selection(kind, columns(kind, B, D, dtype), need, rule, "soft", bias=bias)
            yield selection(kind, columns(kind, B, D, dtype), None, rule)
    for rule in cpu.RULES:
        yield selection("zeros", torch.zeros(B, D, dtype=dtype), None, rule, rescue_k=4)  # leaves a rest of vectors
    random, quantized = columns("random", B, D, dtype), columns("quantized", B, D, dtype)
    for rescue_k in (1, 32, 33, 97, 0):
        yield selection("random", random, need, rescue_k=rescue_k)
        yield selection("quantized", quantized, need, "cosine", "soft", rescue_k)
    rising = torch.arange(1.0, B + 1, dtype=dtype)[:, None].expand(B, D) * 1e-3
    some = uniform(B, 5, dtype) < 0.01
    for label, hostile in {
        "1/rank": 1 / torch.arange(1, B + 1, dtype=dtype),
        "zero": torch.zeros(B, dtype=dtype),
        "minus zero": -torch.zeros(B, dtype=dtype),
        "nan": torch.where(some, torch.nan, need),
        "inf": torch.where(some, torch.inf, need),
        "negative": -need,
    }.items():
        for activation in (rising, quantized):
            yield selection(f"need {label}", activation, hostile)
    for odd in (1e30, torch.inf, -torch.inf, torch.nan):
        activation = random.clone()
        activation[3::500, ::2] = odd
        yield selection(f"outliers {odd}", activation, need)
        yield selection(f"outliers {odd}", activation, need, "clamped_cosine")
    for rows, features in ((1, 2), (17, 19), (67, 3)):
        yield selection("small", columns("random", rows, features, dtype), uniform(rows, 6, dtype))


def cases() -> list[Case]:
    """Every stage in both dtypes: ties, NaN, primes, every rule."""
    found = []
    for dtype in (torch.float32, torch.float64):
        found += _selections(dtype)
        for kind in COLUMNS:
            found += [competition(kind, columns(kind, B, D, dtype), 8), rank(kind, columns(kind, B, D, dtype))]
            found.append(neighbors(kind, columns(kind, 67, 67, dtype), 9))
            found.append(neighbors_of_both(kind, columns(kind, 19, 67, dtype), 4, 19))
        random = columns("random", B, D, dtype)
        found.append(competition("coupled", random, 1, forces="coupled", rescue_onset=0.3, pull_onset=0.2))
        found.append(competition("enough for several threads", columns("random", 2053, 131, dtype), 18))
        for odd in (torch.nan, -torch.tensor(torch.nan), torch.inf):
            some = torch.where(uniform(B * D, 10, dtype).view(B, D) < 0.02, odd, random)
            found += [competition(f"{odd} in it", some, 8, smooth=False), rank(f"{odd} in it", some)]
            found += [neighbors(f"{odd} in it", some[:D], k, first) for k, first in ((1, 0), (D - 1, 0), (4, 7))]
            found.append(neighbors_of_both(f"{odd} in it", some[: D + 5], 4, D + 5))
        found += [
            inverse_norm("random", random),
            inverse_norm("huge", random * (1e25 if dtype == torch.float32 else 1e200)),
        ]
        found.append(gradient("random", random, uniform(B * D, 11, dtype).view(B, D)))
        for pulled, offset in ((False, False), (True, False), (True, True)):
            found.append(targets(f"pulled {pulled}, offset {offset}", dtype, pulled, offset))
    return found
