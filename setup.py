"""Build script: the metadata, and kernels/ installed as bcl_fast.kernels."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

VERSION = re.search(r'^__version__ = "(.+)"$', Path("bcl_fast/__init__.py").read_text(encoding="utf-8"), re.M)[1]


class Sdist(sdist):
    """A source archive that also holds the folders no package claims."""

    def make_release_tree(self, base_dir, files):
        unclaimed = (path for folder in ("csrc", "bench", "tests") for path in Path(folder).rglob("*"))
        extra = {str(path) for path in unclaimed if path.is_file() and "__pycache__" not in path.parts}
        super().make_release_tree(base_dir, sorted(extra.union(files)))


setup(
    name="bcl-fast",
    version=VERSION,
    description="Bidirectional Competitive Learning for PyTorch: a linear layer whose features compete",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The bcl_fast developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["bcl_fast", "bcl_fast.experiments", "bcl_fast.kernels"],
    package_dir={"bcl_fast.kernels": "kernels"},
    # kernels/ has no __init__.py: with one, a checkout on the path would hide another package of the name `kernels`.
    # Its README keeps the folder in the wheel where it holds no module.
    package_data={"bcl_fast.kernels": ["README.md"], "bcl_fast.experiments": ["report.html"]},
    install_requires=["torch>=2.11", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "demo": ["typer", "rich", "matplotlib", "scikit-learn", "torchvision", "tensorboard"],
        "test": ["pytest", "hypothesis", "setuptools>=77"],  # setuptools: tests/test_packaging.py builds with it
        "bench": ["pytest-benchmark"],
    },
    entry_points={"console_scripts": ["bcl-fast = bcl_fast.__main__:main"]},
    cmdclass={"sdist": Sdist},
)
