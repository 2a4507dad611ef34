"""What a compiled library asks the dynamic linker for."""

import os
import re
import subprocess

# Every Linux with glibc has these; `libgomp` is not among them.
SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def needs(library):
    """The names of the libraries that must be loaded with it, and of any folder where they are to be looked for."""
    words = ["readelf", "--dynamic", str(library)]
    text = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"}).stdout
    found = set(re.findall(r"\((?:NEEDED|RPATH|RUNPATH)\)[^\[]*\[(.*)\]", text))
    assert found, text
    return found
