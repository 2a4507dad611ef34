"""What compiled kernels take of a GPU."""

import os
import re
import subprocess

LINES = re.compile(r"arch = (sm_\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def resources(cuobjdump, path):
    """{(architecture or None, kernel): (registers of a thread, its bytes of memory)}; spills are bytes of its stack."""
    words = [cuobjdump, "-res-usage", os.fspath(path)]
    listing, sm, found = subprocess.run(words, capture_output=True, text=True, check=True).stdout, None, {}
    for arch, kernel, *numbers in LINES.findall(listing):
        if arch:
            sm = arch
        else:
            registers, stack, local = map(int, numbers)
            found[sm, kernel] = registers, stack + local
    return found
