"""What a GPU machine need not build, made on a machine without a GPU: `python bench/prebuild.py FOLDER`.

FOLDER gets the CUDA library for one kind of GPU and Triton's cache of everything that bench/gpu_check.py launches
outside of the tests. `gpu_check.py --prebuilt FOLDER` uses both. The cache holds where Triton's version key is the
same, which both print; elsewhere it is just not used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu import prebuilt, variants
from gpu.plans import GPU, REHEARSAL, Plan
from gpu.tools import ROOT
from stages import stage_calls

from bcl_fast import backends
from bcl_fast.measure.implementations import build
from bcl_fast.measure.precisions import PRECISIONS


def library(target: Path, capability: int) -> None:
    """The CUDA library with all its forms, built outside of the checkout."""
    work = target.parent / "build"
    words = ["-q", "build_ext", "--force", "--build-lib", str(work), "--build-temp", str(work)]
    kind = {"BCL_FAST_EXT": "cuda", "BCL_FAST_CUDA_ARCHITECTURES": str(capability)}
    subprocess.run([sys.executable, "setup.py", *words], cwd=ROOT, check=True, env=os.environ | kind)
    shutil.move(work / "bcl_fast" / "_cuda.so", target)
    shutil.rmtree(work)


QUICK = replace(REHEARSAL, deep=(), large=(), growing={})


def launch_all(plan: Plan) -> None:
    """Every launch of Triton that the check makes outside of the tests, on tensors without numbers."""
    for size in (*plan.sizes, *plan.odd, *plan.large):
        for precision in PRECISIONS:
            implementation = build("triton", size, None, "meta", precision)
            implementation.refresh()
            implementation.step()
    for size in (*plan.sizes, *plan.odd, *plan.deep):
        for stage, given in stage_calls(size, "meta", "triton", drawn=size in plan.deep).items():
            backends.stage(stage, "triton")(*given)
    for size in plan.sizes[-2:] if plan is GPU else ():
        for stage, given in stage_calls(size, "meta", "triton").items():
            for variant in variants.variants("triton", stage):
                with variants.applied(variant):
                    backends.stage(stage, "triton")(*given)
    for size in plan.ranked:
        backends.stage("rank", "triton")(stage_calls(size, "meta", "triton")["rank"][0])
    for sizes in plan.growing.values():
        for size in sizes:
            build("triton", size, None, "meta").step()


def warm(plan: Plan, capability: int) -> None:
    """In a process of its own: `only_compile` leaves nothing as it was."""
    prebuilt.only_compile(capability)
    counts = prebuilt.counted()
    launch_all(plan)
    print(json.dumps(counts))


def cache(folder: Path, capability: int, quick: bool) -> dict[str, int]:
    """Fill Triton's cache; what was compiled and what was found there."""
    words = [sys.executable, __file__, str(folder), "--warm", "--capability", str(capability), *["--quick"] * quick]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(words, cwd=ROOT, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def size_mb(paths: Iterator[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what gpu_check.py takes as --prebuilt")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, without a point (default 90)")
    parser.add_argument("--quick", action="store_true", help="only the cache, of the rehearsal's sizes")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm:
        return warm(QUICK if options.quick else GPU, options.capability)
    folder, started = options.folder.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if not options.quick:
        library(folder / "_cuda.so", options.capability)
    built = time.monotonic() - started
    counts = cache(folder / "triton", options.capability, options.quick)
    prebuilt.pruned(folder / "triton")
    prebuilt.relocated(folder / "triton")
    description = {
        "triton_key": prebuilt.triton_key(),
        "capability": options.capability,
        "library_seconds": round(built, 1),
        "cache_seconds": round(time.monotonic() - started - built, 1),
        "mb": round(size_mb(folder.rglob("*")), 1),
        **counts,
    }
    (folder / "prebuilt.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(description))


if __name__ == "__main__":
    main()
