"""Damaged, foreign and forbidden files: every command says which in one line, and what to do, and exits with 2."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

typer_testing = pytest.importorskip("typer.testing", reason="needs the extra [demo]")
pytest.importorskip("matplotlib", reason="needs the extra [demo]")
pytest.importorskip("sklearn", reason="needs the extra [demo]")

from bcl_fast import __main__ as cli  # noqa: E402
from bcl_fast.experiments import judging  # noqa: E402
from bcl_fast.experiments.data import read_idx  # noqa: E402
from bcl_fast.experiments.run import Condition, trained  # noqa: E402
from bcl_fast.spec import BCLConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ["sweep", "--som-lr", "0.01", "--rescue-k", "1", "--seeds", "1", "--steps", "3", "--workers", "1", "--out"]
TABLE = ["table", "trace", "--data", "digits", "--seeds", "1", "--steps", "3", "--workers", "1", "--out"]
TRAIN = ["train", "--steps", "3", "--out"]
SCALE = ["--sizes", "4", "--contestants", "linear", "--out"]


def invoke(*words):
    return typer_testing.CliRunner().invoke(cli.app, [str(word) for word in words])


def refused(words, path, capfd):
    """The one line in which a command refuses `path`."""
    result = invoke(*words)
    errors = (result.stderr + capfd.readouterr().err).strip().splitlines()
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.exit_code, result.exception)
    assert len(errors) == 1 and errors[0].startswith("error: ") and str(path) in errors[0], errors
    return errors[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What train, table and sweep leave behind."""
    folder = tmp_path_factory.mktemp("good")
    for name, words in (("train", TRAIN), ("tables", TABLE), ("sweep", SWEEP)):
        result = invoke(*words, folder / name)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


# --- Damages ----------------------------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path):
    path.write_bytes(bytes(range(255, 0, -1)) * 20)


def empty(path):
    path.write_bytes(b"")


def folder_instead(path):
    path.unlink()
    path.mkdir()


def unreadable(path):
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


def json_list(path):
    path.write_text(json.dumps([json.loads(path.read_text())]))


def json_without_keys(path):
    path.write_text("{}")


def json_of_texts(path):
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "text")))


def rows_of_numbers(path):
    path.write_text(json.dumps(_with_rows(json.loads(path.read_text()), lambda row: 1)))


def rows_of_texts(path):
    path.write_text(json.dumps(_with_rows(json.loads(path.read_text()), lambda row: dict.fromkeys(row, "text"))))


def rows_without_keys(path):
    path.write_text(json.dumps(_with_rows(json.loads(path.read_text()), lambda row: {})))


def _with_rows(value, change):
    """The same record with every list of rows in it changed."""
    if not isinstance(value, dict):
        return value
    changed = {key: _with_rows(item, change) for key, item in value.items()}
    return changed | {"rows": [change(row) for row in value["rows"]]} if "rows" in value else changed


def foreign_checkpoint(path):
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)


def list_checkpoint(path):
    torch.save([torch.zeros(3)], path)


def checkpoint_of_numbers(path):
    saved = torch.load(path, weights_only=True)
    torch.save({name: dict.fromkeys(value, 1) if isinstance(value, dict) else 1 for name, value in saved.items()}, path)


FILES = [truncated, garbage, empty, folder_instead, unreadable]
CONTENTS = [json_without_keys, json_of_texts, rows_of_numbers, rows_of_texts, rows_without_keys]
RECORDS = [*FILES, json_list, *CONTENTS]
CHECKPOINTS = [*FILES, foreign_checkpoint, list_checkpoint, checkpoint_of_numbers, Path.unlink]
over_records = pytest.mark.parametrize("damage", RECORDS, ids=lambda damage: damage.__name__)
over_checkpoints = pytest.mark.parametrize("damage", CHECKPOINTS, ids=lambda damage: damage.__name__)


# --- Records and checkpoints ------------------------------------------------------------------------------------------


def over(names, cases):
    """Parametrize over a command and a damage of its list: cases is command -> damages."""
    pairs = ((command, damage) for command, damages in cases.items() for damage in damages)
    return pytest.mark.parametrize(names, [pytest.param(*pair, id=f"{pair[0]}-{pair[1].__name__}") for pair in pairs])


# One function reads every file; what is in it is read by each command.
@over("kind, damage", {"train": RECORDS, "tables": CONTENTS, "sweep": CONTENTS})
def test_report(kind, damage, copy, capfd):
    path = copy / kind / f"{kind}.json"
    damage(path)
    refused(["report", copy / kind], path, capfd)
    assert not (copy / kind / "report.html").exists()


@over_checkpoints
def test_report_s_checkpoint(damage, copy, capfd):
    path = copy / "train" / "train.pt"
    damage(path)
    refused(["report", copy / "train"], path, capfd)


@pytest.mark.parametrize("damage", [truncated, checkpoint_of_numbers, Path.unlink], ids=lambda damage: damage.__name__)
def test_report_s_checkpoint_of_a_single_run(damage, copy, tmp_path, monkeypatch, capfd):
    """That of the pair of runs of a table that the page shows."""
    from bcl_fast.experiments import report

    monkeypatch.setattr(report, "SHOWN_PAIRS", (("soft-clamp", "soft-clamp"),))
    (path,) = (copy / "tables" / "runs").glob("*.pt")
    damage(path)
    refused(["report", copy / "tables"], path, capfd)


@over("command, damage", {"sweep": RECORDS, "table": CONTENTS})
def test_a_finished_run_of_many(command, damage, copy, capfd):
    words, folder = {"sweep": (SWEEP, copy / "sweep"), "table": (TABLE, copy / "tables")}[command]
    path = next(iter(sorted((folder / "runs").glob("*-bcl-*.json"))))
    damage(path)
    assert "delete it" in refused([*words, folder], path, capfd) or damage in (folder_instead, unreadable)


def test_a_damaged_run_is_computed_again_as_the_line_says(copy, capfd):
    path = next(iter((copy / "sweep" / "runs").glob("*-bcl-*.json")))
    before = json.loads(path.read_text())
    truncated(path)
    refused([*SWEEP, copy / "sweep"], path, capfd)
    path.unlink()
    path.with_suffix(".pt").unlink()
    assert invoke(*SWEEP, copy / "sweep").exit_code == 0 and json.loads(path.read_text()) == before


def test_what_is_not_there(tmp_path, copy, capfd):
    nowhere, record = tmp_path / "nowhere", copy / "train" / "train.json"
    refused(["report", nowhere], nowhere, capfd)
    refused(["report", record], record, capfd)


@pytest.mark.parametrize("name", ["pictures", "report.html"])
def test_report_that_cannot_be_written(name, copy, capfd):
    if name == "pictures":
        (copy / name).write_text("a file")
    else:
        (copy / name).mkdir()
    refused(["report", copy], copy / name, capfd)
    assert not list(copy.glob("*.part"))


# --- Folders to write to ----------------------------------------------------------------------------------------------


def a_file(path):
    path.write_text("a file")
    return path


def below_a_file(path):
    return a_file(path) / "out"


def unwritable(path):
    path.mkdir()
    path.chmod(0o555)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write everywhere")
    return path


def no_folder_of_files(path):
    """Where files can be neither written nor made, by anybody."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    return Path("/proc/self/fd")


COMMANDS = {"train": TRAIN, "table": TABLE, "sweep": SWEEP}
COMMANDS |= {name: ["bench", name, *SCALE] for name in ("scale-d", "scale-b")}


NO_FOLDERS = [a_file, below_a_file, unwritable, no_folder_of_files]


@over("command, kind", dict.fromkeys(COMMANDS, [a_file]) | {"train": NO_FOLDERS})
def test_out_that_cannot_be_written_is_said_before_anything_is_computed(command, kind, tmp_path, monkeypatch, capfd):
    for name in ("Training.step", "jobs.run_jobs"):
        monkeypatch.setattr(f"bcl_fast.experiments.{'run.' if name[0] == 'T' else ''}{name}", None)
    out = kind(tmp_path / "out")
    assert "--out must be a folder to write to" in refused([*COMMANDS[command], out], out, capfd)


WRITTEN = {"train": ["train.json", "train.pt", "train.png"], "sweep": ["sweep.csv", "sweep.png", "runs"]}
WRITTEN["table"] = ["tables.json", "runs"]


@pytest.mark.parametrize("command, name", [(command, name) for command, names in WRITTEN.items() for name in names])
def test_results_that_cannot_be_written(command, name, copy, capfd):
    out = copy / {"table": "tables"}.get(command, command)
    if name == "runs":
        shutil.rmtree(out / name)
        (out / name).write_text("a file")
    else:
        folder_instead(out / name)
    refused([*COMMANDS[command], out], out / name, capfd)


# --- MNIST ------------------------------------------------------------------------------------------------------------

IMAGES = Path("MNIST", "raw", "train-images-idx3-ubyte")


@pytest.fixture
def mnist(tmp_path):
    path = tmp_path / "data" / IMAGES
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack(">4I", 0x803, 200, 28, 28) + bytes(range(256)) * 612 + bytes(200 * 784 - 256 * 612))
    return path


def without_pixels(path):
    path.write_bytes(path.read_bytes()[:16])


def of_labels(path):
    path.write_bytes(struct.pack(">2I", 0x801, 200) + bytes(200))


def of_no_images(path):
    path.write_bytes(struct.pack(">4I", 0x803, 0, 28, 28))


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def test_images_of_mnist_s_format(mnist):
    images = read_idx(mnist)
    assert images.shape == (200, 28, 28) and images.flatten()[:300].tolist() == [i % 256 for i in range(300)]


DAMAGED_IMAGES = [*FILES, without_pixels, of_labels, of_no_images, longer]


@over("command, damage", {"train": DAMAGED_IMAGES, "table": [truncated], "sweep": [truncated]})
def test_mnist(command, damage, mnist, tmp_path, capfd):
    damage(mnist)
    words = [*COMMANDS[command], tmp_path / "out", "--data", "mnist", "--data-dir", tmp_path / "data"]
    line = refused(words, mnist, capfd)
    assert "--download" in line or damage in (folder_instead, unreadable)
    assert not (tmp_path / "out").exists()


def nowhere(path):
    """Nothing is made."""


@over("command, kind", {"train": [Path.mkdir, a_file, nowhere], "table": [nowhere], "sweep": [nowhere]})
def test_no_mnist(command, kind, tmp_path, capfd):
    kind(tmp_path / "data")
    words = [*COMMANDS[command], tmp_path / "out", "--data", "mnist", "--data-dir", tmp_path / "data"]
    assert "--data-dir" in refused(words, tmp_path / "data", capfd)


def test_mnist_is_trained_on(mnist, tmp_path):
    words = [*TRAIN, tmp_path / "out", "--data", "mnist", "--data-dir", tmp_path / "data", "--batch-size", 16]
    result = invoke(*words)
    assert result.exit_code == 0, result.output


# --- What is not installed --------------------------------------------------------------------------------------------

EXTRAS = [
    *((package, TRAIN) for package in ("typer", "rich", "matplotlib", "sklearn")),
    ("tensorboard", [*TRAIN[:-1], "--tensorboard", "--out"]),
    ("torchvision", [*TRAIN[:-1], "--data", "mnist", "--data-dir", "nowhere", "--download", "--out"]),
    ("matplotlib", ["report"]),
    ("matplotlib", COMMANDS["scale-d"]),
]


@pytest.mark.parametrize("package, words", EXTRAS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_missing_package_names_the_install_command(package, words, tmp_path):
    code = (
        f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv = ['bcl_fast', *{[*words, str(tmp_path)]!r}]; "
    )
    code += "runpy.run_module('bcl_fast', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and package in line and 'pip install "bcl-fast[demo]"' in line


# --- What a table does with a run that is not one of its condition ---------------------------------------------------


def test_check_lets_every_record_of_every_condition_pass():
    """Of few steps, with what training leaves out or cannot measure (null)."""
    from bcl_fast.experiments.data import digits
    from bcl_fast.experiments.jobs import rows_of
    from bcl_fast.experiments.settings import SETTINGS

    record = json.loads(json.dumps(trained(Condition("digits", BCLConfig(), 32), digits(), rows_of(32)).record()))
    for name in SETTINGS:
        judging.check(name, record)
        judging.check(name, {"rows": [], "held_out": {"l1": 0.1, "mse": None}})
    record["rows"][5].pop("aff_sim")
    with pytest.raises(KeyError, match="aff_sim"):
        judging.check("soft-clamp", record)
