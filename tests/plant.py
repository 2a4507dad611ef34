"""Plant faults in a copy of the checkout, one at a time, and see whether the tests catch them.

    python tests/plant.py [NAME ...]     all faults, or those of these names

A fault is a text of the sources and what takes its place; the file is found by the text, wherever it is in its room.
Exit status 0: every fault was caught; 1: one survived; 2: a text is not there once and only once, or the tests do not
pass without any fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "bcl_fast",
    "kernels",
    "csrc",
    "tests",
    "bench",
    "build",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
NOTHING_COLLECTED, USAGE = 5, 4  # exit statuses of pytest


class Fault(NamedTuple):
    name: str
    room: str  # a folder of sources, or one of its files
    old: str
    new: str
    tests: str  # a file of tests, and words for -k


FAULTS = (
    Fault(
        "tie by the larger index",
        "bcl_fast/portable.py",
        "torch.where(score == last, index, -1)",
        "torch.where(score == last, C - 1 - index, -1)",
        "test_stages.py selection_is_bit_equal and portable and quantized",
    ),
    Fault(
        "rank off by one",
        "bcl_fast/portable.py",
        "affinity = (B - 1 - place)",
        "affinity = (B - place)",
        "test_stages.py selection_is_bit_equal and portable and random",
    ),
    Fault(
        "backward without its mask",
        "bcl_fast/portable.py",
        "torch.mul(grad_output, mask, out=out)",
        "grad_output",
        "test_stages.py test_gradient and portable",
    ),
    Fault(
        "stale neighbors",
        "bcl_fast",
        "if now % recompute_every == 0 and",
        "if now == 0 and",
        "test_layer.py test_neighbors_are_refreshed_when_due",
    ),
    Fault(
        "a lost pull",
        "bcl_fast",
        "            backward.pulled = True\n            self._pull(layer, weight, arrived)\n",
        "            backward.pulled = True\n",
        "test_training.py each_backward_pulls_once",
    ),
    Fault(
        "a pull applied twice",
        "bcl_fast",
        "kept, self.kept = self.kept, None",
        "kept = self.kept",
        "test_training.py bound_pulls_are_averaged",
    ),
    Fault(
        "eps outside of the division",
        "bcl_fast/portable.py",
        "per_sample_weights=pull) / (total + EPS)",
        "per_sample_weights=pull) / total + EPS",
        "test_stages.py features_nobody_won and portable",
    ),
    Fault(
        "need ignored",
        "bcl_fast/portable.py",
        "    if need is None:\n        score = ",
        "    if True:\n        score = ",
        "test_stages.py selection_is_bit_equal and portable and random",
    ),
    Fault(
        "novelty and win_rate swapped",
        "bcl_fast/portable.py",
        "return Competition(rank_score, novelty, win_rate,",
        "return Competition(rank_score, win_rate, novelty,",
        "test_stages.py test_competition and portable and random",
    ),
    Fault(
        "offset forgotten",
        "bcl_fast/portable.py",
        "        increment.sub_(som_offset)\n",
        "        pass\n",
        "test_stages.py targets_and_pull and portable",
    ),
    Fault(
        "bias left in the key",
        "bcl_fast/portable.py",
        "activation[:, a:b] - bias[a:b]",
        "activation[:, a:b]",
        "test_stages.py selection_is_bit_equal and portable and random",
    ),
    Fault(
        "winner by rank_score",
        "bcl_fast/portable.py",
        "    winner = margin.argmax(dim=1)\n    rank_score = margin.mul_(temperature).sigmoid_()\n",
        "    rank_score = margin.mul_(temperature).sigmoid_()\n    winner = rank_score.argmax(dim=1)\n",
        "test_stages.py test_competition and portable and huge",
    ),
    Fault(
        "step not advanced",
        "bcl_fast",
        "write_counter_(step, read_counter(step) + 1)",
        "write_counter_(step, read_counter(step))",
        "test_training.py each_backward_pulls_once",
    ),
    Fault(
        "bound pulls not averaged",
        "bcl_fast",
        "kept.mean.mul_(kept.samples / total).add_(increment, alpha=pull.x.shape[0] / total)",
        "kept.mean.add_(increment)",
        "test_training.py bound_pulls_are_averaged",
    ),
    Fault(
        "found_inf ignored",
        "bcl_fast",
        "if found_inf is not None:",
        "if False:",
        "test_training.py grad_scaler_skips_the_pull",
    ),
    Fault(
        "step not saved",
        "bcl_fast",
        'self.register_buffer(name, buffer, persistent=name != "_refreshed_at")',
        'self.register_buffer(name, buffer, persistent=name not in ("_refreshed_at", "step"))',
        "test_state.py resumed_run",
    ),
    Fault(
        "statistics in the dtype of autocast",
        "bcl_fast",
        "    with no_autocast(device.type):\n        if device.type",
        "    with nullcontext():\n        if device.type",
        "test_training.py autocast_keeps_statistics",
    ),
    Fault(
        "a stop at a tie on the CPU",
        "csrc/cpu",
        "p < B && !(need[p] * top < least)",
        "p < B && need[p] * top > least",
        "test_stages.py tie_at_the_boundary and cpu",
    ),
    Fault(
        "a later tile wins a tie in Triton",
        "kernels",
        "winner = tl.where(here > best,",
        "winner = tl.where(here >= best,",
        "test_stages.py winner_of_equal_margins and triton",
    ),
    Fault(
        "a stop at a tie in CUDA",
        "csrc/cuda",
        "__all_sync(0xFFFFFFFFu, reach < ",
        "__all_sync(0xFFFFFFFFu, reach <= ",
        "test_stages.py tie_at_the_boundary and cuda",
    ),
)


def holder(fault: Fault, root: Path) -> Path | None:
    """The one file of the fault's room that holds its text once; else says what is there and returns None."""
    room = root / fault.room
    files = (
        [room] if room.is_file() else [path for path in sorted(room.rglob("*")) if path.suffix not in (".so", ".pyc")]
    )
    found = {
        path: text.count(fault.old)
        for path in files
        if path.is_file() and fault.old in (text := path.read_text(encoding="utf-8", errors="replace"))
    }
    if list(found.values()) == [1]:
        return next(iter(found))
    there = ", ".join(f"{path.relative_to(root)} ({count} times)" for path, count in found.items()) or "no file"
    print(f"{fault.name}: NOT PLANTED: the text {fault.old!r} is in {there} of {fault.room}", flush=True)
    return None


def run_tests(faults: Sequence[Fault], copy: Path) -> int:
    """pytest's exit status for the tests of these faults in the copy."""
    files, words = zip(*(fault.tests.split(" ", 1) for fault in faults), strict=True)
    names = [f"tests/{file}" for file in dict.fromkeys(files)]
    chosen = " or ".join(f"({word})" for word in dict.fromkeys(words))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names, "-k", chosen]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    return done.returncode


def build_cpu(copy: Path) -> None:
    environment = os.environ | {"BCL_FAST_EXT": "cpu"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True)


def verdict(fault: Fault, copy: Path) -> str:
    """`caught`, `survived`, or why neither can be said."""
    path = holder(fault, copy)
    if path is None:
        return "not planted"
    before, library = path.read_text(encoding="utf-8"), copy / "bcl_fast" / "_cpu.so"
    built = fault.room.startswith("csrc/cpu")
    kept = library.read_bytes() if built else b""
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        if built:
            build_cpu(copy)
        status = run_tests([fault], copy)
    finally:
        path.write_text(before, encoding="utf-8")
        if built:
            library.write_bytes(kept)
    if status in (NOTHING_COLLECTED, USAGE):
        return "without a test"
    return "caught" if status == 1 else "survived" if status == 0 else f"stopped with status {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(fault.name for fault in FAULTS))
    wanted = parser.parse_args().names
    unknown = set(wanted) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}")
    faults = [fault for fault in FAULTS if not wanted or fault.name in wanted]
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, copy / name)
        if not (copy / "bcl_fast" / "_cpu.so").exists():
            build_cpu(copy)
        if (status := run_tests(faults, copy)) != 0:
            print(f"the tests of these faults do not pass without them: pytest ended with status {status}")
            return 2
        for fault in faults:
            begin = time.perf_counter()
            verdicts.append(verdict(fault, copy))
            print(f"{fault.name}: {verdicts[-1]} ({time.perf_counter() - begin:.0f} s)", flush=True)
    print(f"{verdicts.count('caught')} of {len(verdicts)} faults were caught")
    return 0 if set(verdicts) <= {"caught"} else 1 if set(verdicts) <= {"caught", "survived"} else 2


if __name__ == "__main__":
    sys.exit(main())
