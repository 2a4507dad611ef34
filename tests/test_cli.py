"""The command line end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

typer_testing = pytest.importorskip("typer.testing", reason="needs the extra [demo]")
pytest.importorskip("matplotlib", reason="needs the extra [demo]")
pytest.importorskip("sklearn", reason="needs the extra [demo]")

from bcl_fast import __main__ as cli  # noqa: E402
from bcl_fast import backends  # noqa: E402
from bcl_fast.experiments import console as show  # noqa: E402
from bcl_fast.experiments.data import digits  # noqa: E402
from bcl_fast.experiments.run import Condition, Training, row_steps, trained  # noqa: E402
from bcl_fast.experiments.threads import threads_for  # noqa: E402
from bcl_fast.spec import BCLConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def invoke(*words):
    return typer_testing.CliRunner().invoke(cli.app, [str(word) for word in words])


def test_train_in_a_process_of_its_own_writes_record_and_picture(tmp_path):
    options = dict(data="digits", steps=20, seed=3, preset="hard-rank", backend="reference", out=tmp_path / "out")
    options |= {"som-lr": 0.01, "rescue-k": 2}
    words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
    command = [sys.executable, "-m", "bcl_fast", "train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.json", "train.png", "train.pt"]
    assert (tmp_path / "out" / "train.png").read_bytes().startswith(b"\x89PNG")

    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert not record["interrupted"] and record["environment"]["torch"] == torch.__version__
    assert "--preset hard-rank" in record["command"] and "--seed 3" in record["command"]
    config = BCLConfig.preset("hard-rank", som_lr=0.01, rescue_k=2)
    assert BCLConfig.from_dict(record["conditions"]["bcl"]["condition"]["config"]) == config
    assert record["conditions"]["bcl"]["backend"] == "reference" and record["conditions"]["plain"]["backend"] is None

    condition = Condition("digits", config, 20, seed=3, backend="reference")
    here = trained(condition, digits(), row_steps(20)).rows
    for got, expected in zip(record["conditions"]["bcl"]["rows"], here, strict=True):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for heading in ("step", "loss", "wt_sim", "aff_corr", "tgt_sim", "unique", "alive", "novelty", "force"):
        assert heading in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.strip()[:2].strip().isdigit()]) == len(here)


def test_recorded_command_repeats_the_run(tmp_path):
    import shlex

    assert invoke("train", "--steps", 6, "--out", tmp_path / "one").exit_code == 0
    record = json.loads((tmp_path / "one" / "train.json").read_text())
    words = shlex.split(record["command"])
    assert words[:4] == ["python", "-m", "bcl_fast", "train"]
    words[words.index("--out") + 1] = str(tmp_path / "two")
    assert invoke(*words[3:]).exit_code == 0
    again = json.loads((tmp_path / "two" / "train.json").read_text())
    assert again["conditions"] == record["conditions"]


@pytest.mark.parametrize("words, threads", [((), 1), (("--threads", 2), 2)])
def test_train_says_and_records_its_threads(words, threads, tmp_path, monkeypatch):
    """A network as small as this is worth one, whatever torch would take; afterwards torch has its own number again."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    result = invoke("train", "--steps", 3, "--out", tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert f"On {threads} thread{'s' * (threads > 1)} (--threads)." in result.output
    assert asked == [threads, 7]
    assert json.loads((tmp_path / "train.json").read_text())["environment"]["threads"] == threads


def test_larger_networks_are_worth_more_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    sizes = [(128, 64, 64), (128, 64, 784), (128, 256, 784), (512, 512, 784)]
    assert [threads_for(*size) for size in sizes] == [1, 1, 3, 6]


def test_interrupt_keeps_what_is_done(tmp_path, monkeypatch):
    step = Training.step

    def interrupted(training):
        if training.done == 7:
            raise KeyboardInterrupt
        return step(training)

    monkeypatch.setattr(Training, "step", interrupted)
    result = invoke("train", "--steps", 50, "--out", tmp_path)
    assert result.exit_code == 130 and "Interrupted" in result.output
    record = json.loads((tmp_path / "train.json").read_text())
    assert record["interrupted"] and (tmp_path / "train.png").stat().st_size > 10_000
    for one in record["conditions"].values():
        assert one["steps_done"] == 7 and [row["step"] for row in one["rows"]] == list(range(7))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "medium"], "preset must be one of 'soft-clamp', .* got 'medium'"),
        (["--steps", "0"], "steps must be an integer >= 1, got 0"),
        (
            ["--backend", "gpu"],
            "backend must be None or one of 'reference', 'portable', 'cpu', 'triton', 'cuda', got 'gpu'",
        ),
        (["--batch-size", "5000"], "batch_size must be at most 1527"),
        (["--device", "tpu"], "device must be one of 'cpu'"),
        (["--data", "mnist", "--data-dir", "nowhere"], "no MNIST in nowhere: .*--data-dir.*--download"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(words, message, tmp_path, capfd):
    result = invoke("train", *words, "--out", tmp_path / "out")
    errors = (result.stderr + capfd.readouterr().err).strip().splitlines()
    assert result.exit_code == 2 and len(errors) == 1 and re.search(message, errors[0])
    assert not (tmp_path / "out").exists()


def test_a_growing_table_on_a_terminal():
    from rich.console import Console

    console = Console(force_terminal=True, width=120, height=30, record=True)
    data = digits()
    condition = Condition("digits", BCLConfig(), 5)
    pair = [Training(each, data, row_steps(5)) for each in (condition, condition.control())]
    with show.TrainingTable(console, 5) as table:
        for _ in range(5):
            table.on_step([training.step() for training in pair])
    text = console.export_text()
    assert "aff_corr" in text and "5/5" in text
    assert len(table.cells) == 5


def test_tensorboard_gets_every_row_of_both(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert invoke("train", "--steps", 12, "--tensorboard", "--loss", "mse", "--out", tmp_path).exit_code == 0
    record = json.loads((tmp_path / "train.json").read_text())
    for name, one in record["conditions"].items():
        assert one["condition"]["loss"] == "mse"
        log = events.EventAccumulator(str(tmp_path / "tensorboard" / name))
        log.Reload()
        for key in ("loss", "wt_sim", "alive"):
            scalars = [(event.step, event.value) for event in log.Scalars(key)]
            assert scalars == [(row["step"], pytest.approx(row[key], abs=1e-6)) for row in one["rows"]]


@pytest.mark.parametrize(
    "words, message",
    [
        (["table", "trance"], "table must be one of 'all', 'trace', .* got 'trance'"),
        (["table", "trace", "--data-dir", "nowhere"], "no MNIST in nowhere: .*--data-dir.*--download"),
        (["table", "trace", "--data", "digits", "--backend", "gpu"], "backend must be None or one of"),
        (["sweep", "--som-lr", "0.1,x"], "som_lr must be numbers separated by commas, got '0.1,x'"),
        (["sweep", "--rescue-k", "1,-1"], "rescue_k must be an integer >= 0, got -1"),
    ],
)
def test_bad_options_of_many_runs_are_one_line_and_write_nothing(words, message, tmp_path, capfd):
    result = invoke(*words, "--out", tmp_path / "out")
    errors = (result.stderr + capfd.readouterr().err).strip().splitlines()
    assert result.exit_code == 2 and len(errors) == 1 and re.search(message, errors[0]), result.output
    assert not (tmp_path / "out").exists()


def test_table_prints_each_cell_and_why(tmp_path):
    result = invoke("table", "trace", "--data", "digits", "--steps", 3, "--seeds", 2, "--out", tmp_path)
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if re.match(r" *aff_sim +2 ", line))
    record = json.loads((tmp_path / "tables.json").read_text())
    row = next(row for row in record["rows"] if (row["column"], row["row"]) == ("aff_sim", "2"))
    for text in (
        "0.448",
        f"{row['median']:.3f}",
        f"{row['min']:.3f}..{row['max']:.3f}",
        "not comparable",
        "other data",
    ):
        assert text in line
    assert "Published cells: 53 not comparable" in result.output and row["seeds"] == [0, 1]


def test_sweep_prints_the_grid_and_its_control(tmp_path):
    words = ["--som-lr", "0.01,0.1", "--rescue-k", "1,3", "--seeds", 1, "--steps", 3, "--out", tmp_path]
    result = invoke("sweep", *words)
    assert result.exit_code == 0, result.output
    lines = [line.split()[:2] for line in result.output.splitlines()]
    for cell in (["0.01", "1"], ["0.01", "3"], ["0.1", "1"], ["0.1", "3"]):
        assert cell in lines
    assert any(line[:1] == ["plain"] for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "sweep.csv", "sweep.json", "sweep.png"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("axis, sizes, timed", [("D", (16, 8, 32), "linear"), ("B", (16,), "portable")], ids=["D", "B"])
def test_bench_scale_writes_rows_floors_and_a_picture(axis, sizes, timed, tmp_path):
    names, listed = (timed, "cuda"), ",".join(map(str, sizes))
    words = ["--contestants", ",".join(names), "--inputs", 8, "--threads", 1, "--out", tmp_path]
    result = invoke("bench", f"scale-{axis.lower()}", "--sizes", listed, *words)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {f"scale-{axis.lower()}.json", f"scale-{axis.lower()}.png"}
    record = json.loads((tmp_path / f"scale-{axis.lower()}.json").read_text())
    assert f"bench scale-{axis.lower()} --sizes {listed}" in record["command"] and record["environment"]["date"]
    assert record["environment"]["threads"] == 1 and record["exponents"].keys() == (
        {timed} if len(sizes) > 2 else set()
    )
    assert [(one[axis], one["contestant"]) for one in record["rows"]] == [
        (size, name) for size in sorted(sizes) for name in names
    ]
    fixed = "--batch-size 1024" if axis == "D" else "--features 1024"
    assert fixed in record["command"]  # an option by its flag, whatever its argument is called
    for one in record["rows"]:
        assert one["N"] == 8 and one["floor_ms"] > 0 and (one["ms"] is None) == (one.get("rounds") is None)
        assert (one["contestant"] == "cuda") == (one["ms"] is None) == (one["peak_mb"] is None)
        assert any(line.split()[:2] == [str(one[axis]), one["contestant"]] for line in result.output.splitlines())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sizes", "8,x"], "sizes must be integers separated by commas, got '8,x'"),
        (["--sizes", "1"], "sizes must be an integer >= 2, got 1"),
        (["--contestants", "linear,nobody"], "contestants must be one of 'linear', .*, got 'nobody'"),
        (["--device", "nowhere"], "device must be one of 'cpu'.*, got 'nowhere'"),
    ],
)
def test_bench_scale_names_what_is_wrong(words, message, tmp_path, capfd):
    result = invoke("bench", "scale-d", *words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and re.search(message, result.stderr + capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_doctor_names_versions_devices_and_reasons():
    result = invoke("doctor")
    assert result.exit_code == 0
    for part in ("Python", torch.__version__, "Triton", "cpu", *backends.NAMES, "CUDA library"):
        assert part in result.output
    assert re.search(rf"cpu\W+yes\W+{backends.fastest('cpu')}\W+tested and measured", result.output)
    assert re.search(r"any other\W+no\W+portable\W+never run", result.output)


@pytest.mark.parametrize("device", ["mps", "xpu"])
@pytest.mark.parametrize("here", [True, False])
def test_doctor_names_the_device_that_torch_was_built_for(device, here, monkeypatch):
    """It may not be there: then torch names it only where nobody asks for one that is."""
    accelerator = torch.device(device)
    found = lambda check_available=False: accelerator if here or not check_available else None  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: int(here))
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(get_device_name=lambda i: "a chip"))
    result = invoke("doctor")
    assert re.search(rf"{device}\W+{'yes' if here else 'no'}\W+portable\W+never run", result.output), result.output
    assert (f"{device}:0" in result.output) == here
    can = "yes" if here else "would"
    for backend, serves in (("reference", can), ("portable", can), ("cpu", "no"), ("triton", "no"), ("cuda", "no")):
        assert re.search(rf"{backend}\W+{device}\W+{serves}\b", result.output), result.output


def test_help_lists_every_option():
    result = invoke("train", "--help")
    for option in "data data-dir download preset som-lr rescue-k steps seed backend out".split():
        assert f"--{option} " in result.output
