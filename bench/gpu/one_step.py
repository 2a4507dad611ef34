"""What ncu looks at: the second step of a layer on a GPU. `python bench/gpu/one_step.py BACKEND B D N`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bcl_fast.measure.implementations import Size, build

if __name__ == "__main__":
    backend, *sizes = sys.argv[1:]
    implementation = build(backend, Size(*map(int, sizes)), device="cuda")
    implementation.refresh()
    implementation.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    implementation.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
