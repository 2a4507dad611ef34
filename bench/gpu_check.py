"""Everything that only a GPU can show, from a checkout: `python bench/gpu_check.py --out FOLDER`.

Units of one part, backend and size run one after the other, each in a process of its own and within its time. What they
find is in FOLDER/check.jsonl as soon as they find it, what they print in FOLDER/check.log; a short table ends the
output, and the exit code is 1 if anything failed. `--only`, `--skip`, `--minutes` and `--resume` share the work out
over several runs; `--prebuilt` takes what bench/prebuild.py has compiled; `--rehearse` does the same on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # what runs the kernels of a rehearsal
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu import prebuilt, verdicts
from gpu.parts import PARTS, units
from gpu.plans import GPU, REHEARSAL, Plan
from gpu.tools import ROOT
from gpu.units import Record, run_all

from bcl_fast import backends
from bcl_fast.measure.rows import OK


def prepared(options: argparse.Namespace) -> Plan:
    """The plan, after everything is set that must be so before Triton is imported."""
    if options.rehearse:
        from helpers import cuda_host, interpreter

        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.enable()
        if cuda_host.COMPILER is None:
            return replace(REHEARSAL, backends=("triton",))
        os.environ["BCL_FAST_CUDA"] = str(cuda_host.build("-O2"))
        return REHEARSAL
    if options.prebuilt is None:
        return GPU
    os.environ["TRITON_CACHE_DIR"] = str(prebuilt.relocated(options.prebuilt / "triton"))
    # Not by BCL_FAST_CUDA, which tells the tests that the kernels run on the host.
    shutil.copyfile(options.prebuilt / "_cuda.so", ROOT / "bcl_fast" / "_cuda.so")
    return replace(GPU, prebuilt=options.prebuilt)


def chosen(names: str) -> list[str]:
    wanted = names.split(",") if names else []
    if unknown := set(wanted) - set(PARTS):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    return wanted


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of check.jsonl and check.log")
    parser.add_argument("--only", type=chosen, default=list(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--skip", type=chosen, default=[], help="parts to leave out")
    parser.add_argument("--minutes", type=float, default=8, help="what would not end by then is not begun (default 8)")
    parser.add_argument("--resume", action="store_true", help="keep what is in the folder, repeat nothing that was ok")
    parser.add_argument("--prebuilt", type=Path, help="the folder that bench/prebuild.py has made")
    parser.add_argument("--rehearse", action="store_true", help="every part on the CPU, interpreted, on tiny sizes")
    return parser.parse_args()


def main() -> int:
    started = time.monotonic()
    options = parsed()
    plan = prepared(options)
    for stage in backends.STAGES:
        backends.stage(stage, "triton")  # imported once, for all children
    record = Record(options.out, options.resume)
    done = {key for key, row in record.outcomes().items() if row["status"] == OK}
    parts = [part for part in PARTS if part in options.only and part not in options.skip]
    run_all(units(plan, parts), record, started + 60 * options.minutes, done, partial(print, flush=True))
    if torch.cuda.is_initialized():
        raise RuntimeError("the parent has asked for a GPU: what its children found is not to be trusted")
    summary = f"{verdicts.summary(record.rows(), plan.sizes)}\n{time.monotonic() - started:.0f} s"
    print(summary)
    with open(record.log, "a", encoding="utf-8") as log:
        log.write(f"\n{summary}\n")
    return int(any(row["status"] in verdicts.BAD for row in record.outcomes().values()))


if __name__ == "__main__":
    sys.exit(main())
