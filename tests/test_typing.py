"""mypy finds nothing wrong in the package, and in a user's program exactly what is wrong there."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("mypy", reason="needs the extra [test]")

ROOT = Path(__file__).resolve().parents[1]
# What a line ends with is the code of the error that mypy must report there.
PROGRAM = """
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from bcl_fast import PRESETS, BCLConfig, BCLLayer, Monitor, attach_bcl, bind_optimizer, detach_bcl, graphed
from bcl_fast.diagnostics import row_cosine, step_metrics
from bcl_fast.losses import weight_similarity_loss

x = torch.rand(8, 784)
layer = BCLLayer(784, 64, False, fused=True, backend="portable", config=BCLConfig.preset("hard-rank"), rescue_k=3)
linear: nn.Linear = layer
assert_type(layer(x), Tensor)
assert_type((layer.neighbors, layer.step, layer.som_offset), tuple[Tensor, Tensor, Tensor | None])
assert_type((layer.config.rescue_k, layer.som_lr, layer.backend, layer.frozen), tuple[int, float, str, bool])
layer.som_lr = 0.01
layer.frozen = True

model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 784))
handle = attach_bcl(model, "0", config=BCLConfig(affinity="cosine"), som_lr=0.1)
optimizer = torch.optim.Adam(model.parameters())
handle.layer.bind_optimizer(optimizer)
handle.bind_optimizer([optimizer])
assert_type(handle.layers, dict[str, BCLLayer])
assert_type(attach_bcl(model, lambda name, linear: linear.out_features == 64).layer, BCLLayer)
assert_type((bind_optimizer(model, optimizer), detach_bcl(model)), tuple[list[str], list[str]])
assert_type((layer.to_linear(), layer.effective_weight), tuple[nn.Linear, Tensor])
rows: list[dict[str, float]] = []
with handle.layer.observe(lambda record: rows.append(step_metrics(record))):
    loss = nn.functional.mse_loss(model(x), x) + weight_similarity_loss(handle.layer.weight)
with Monitor(model, [optimizer], every=10, out=None, callback=lambda one: rows.append(one.named())) as monitor:
    monitor.log(loss=loss, epoch=1)
step = graphed(model, nn.functional.l1_loss, optimizer, x, x)
assert_type(BCLLayer.from_linear(nn.Linear(4, 3)), BCLLayer)
assert_type(row_cosine(layer.weight), float)
assert_type(sorted(PRESETS), list[str])

layer(x).neighbors  # attr-defined
layer.som_lr = "fast"  # assignment
BCLLayer("784", 64)  # arg-type
BCLLayer(784, 64, backend=3)  # arg-type
BCLLayer(784)  # call-arg
BCLConfig(rescue="3")  # call-arg
attach_bcl(nn.Linear, "0")  # arg-type
Monitor(model, every="often")  # arg-type
monitor.log(loss="high")  # arg-type
attach_bcl(model, lambda name, linear: name)  # return-value
handle.linear  # attr-defined
""".lstrip()


class Finding(NamedTuple):
    path: str
    line: int
    code: str
    message: str


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What mypy says of the package, by its options in pyproject.toml, and of the program, which imports that."""
    program = tmp_path_factory.mktemp("typed") / "program.py"
    program.write_text(PROGRAM)
    words = [sys.executable, "-m", "mypy", "--no-pretty", "bcl_fast", str(program)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    pattern = r"^(.+?):(\d+): error: (.*?)  \[([\w-]+)\]$"
    found = re.findall(pattern, done.stdout, re.M)
    assert len(found) == done.stdout.count(": error:"), done.stdout
    return [Finding(path, int(line), code, message) for path, line, message, code in found]


def test_the_package_is_typed(findings):
    assert [finding for finding in findings if Path(finding.path).name != "program.py"] == []


def test_a_user_s_program_is_checked_against_it(findings):
    found = {finding.line: finding for finding in findings if Path(finding.path).name == "program.py"}
    marks = (re.search(r"  # ([\w-]+)$", line) for line in PROGRAM.splitlines())
    expected = {number: mark[1] for number, mark in enumerate(marks, 1) if mark}
    assert {line: finding.code for line, finding in found.items()} == expected, found
