"""What measures: floors by formula, stages held to the contract at any size, and the GPU check, rehearsed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import INTERPRETED

from bcl_fast import measure, portable

ROOT = Path(__file__).resolve().parents[1]
SIZE = measure.Size(61, 17, 23)


def test_floor_is_bytes_over_bandwidth():
    """Ceilings of 1 GB/s and 1 TFLOP/s: milliseconds are megabytes and GFLOP."""
    B, D, N, k, r = 100, 50, 20, 8, 5
    floor = measure.Ceilings(1, 1, 1).floor_ms(measure.Size(B, D, N))
    assert floor == pytest.approx({
        "competition": (8 * B * D + 4 * B * N) / 1e6,
        "selection": 4 * B * D / 1e6,
        "targets_pull_": (4 * (B * k + D * r) * N + 8 * D * N) / 1e6,
        "gradient": 12 * B * D / 1e6,
        "products": 6 * B * D * N / 1e9,
    })  # fmt: skip


def test_stages_are_held_to_the_contract():
    errors = measure.check_stages(SIZE, "portable")
    assert {name.split()[0] for name in errors} >= {"neighbours", "competition", "targets_pull_", "gradient"}
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize(
    "stage, spoil, message",
    [
        ("selection", lambda rows, shares: (rows.roll(1, 0), shares), "selection 0 differs in"),
        ("competition", lambda R, *rest: (R * 1.001, *rest), "competition rank_score is off by"),
        ("gradient", lambda masked, total: (masked + 1e-9, total), "gradient 0 differs in"),
        ("neighbours", lambda near: near.flip(0), "neighbours are less similar by"),
    ],
)
def test_the_contract_is_noticed_broken(stage, spoil, message, monkeypatch):
    right = getattr(portable, stage)

    def wrong(*arguments):
        result = right(*arguments)
        return spoil(*result) if isinstance(result, tuple) else spoil(result)

    monkeypatch.setattr(measure.ops, "stage", lambda name, backend: (
        wrong if (name, backend) == (stage, "portable") else OWN_STAGE(name, backend)
    ))  # fmt: skip
    with pytest.raises(AssertionError, match=message):
        measure.check_stages(SIZE, "portable")


OWN_STAGE = measure.ops.stage


def gpu_check(*words, **environment):
    command = [sys.executable, "bench/gpu_check.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(not INTERPRETED, reason="rehearsed in Triton's interpreter")
def test_gpu_check_rehearsed(tmp_path):
    done = gpu_check("--out", tmp_path / "found.json", "--rehearse")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {"environment", "ceilings", "contract", "tests", "timed"} <= report.keys()
    assert report["contract"][0]["errors"] and report["tests"]["exit"] == 0
    assert {row["stage"] for row in report["timed"]["stages"]} >= {"competition", "selection"}
    assert all(row["times_the_floor"] for row in report["timed"]["steps"] if row["contestant"] != "linear")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    done = gpu_check("--out", tmp_path / "found.json", TRITON_INTERPRET="0")
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr and not list(tmp_path.iterdir())
