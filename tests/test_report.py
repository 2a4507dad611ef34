"""The page and its pictures: complete, self-contained, and opened in a browser without an error."""

import json
import re
import shutil
import subprocess

import pytest

typer_testing = pytest.importorskip("typer.testing", reason="needs the extra [demo]")
pytest.importorskip("matplotlib", reason="needs the extra [demo]")
pytest.importorskip("sklearn", reason="needs the extra [demo]")

from bcl_fast import __main__ as cli  # noqa: E402
from bcl_fast.experiments import judging, tables  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def invoke(*words):
    result = typer_testing.CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What train, table and sweep leave behind."""
    folder = tmp_path_factory.mktemp("report")
    invoke("train", "--steps", 12, "--out", folder / "train")
    names = ("trace", "rank", "explanations", "fixes")
    invoke("table", *names, "--data", "digits", "--steps", 4, "--seeds", 1, "--out", folder / "tables")
    invoke(
        "sweep", "--som-lr", "0.001,0.1", "--rescue-k", "1,3,5", "--seeds", 1, "--steps", 4, "--out", folder / "sweep"
    )
    return folder


@pytest.fixture(scope="module")
def page(folder):
    assert "report.html" in invoke("report", folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_table_command_writes_rows_with_every_key(folder):
    record = json.loads((folder / "tables" / "tables.json").read_text())
    assert record["command"].startswith("python -m bcl_fast table trace rank explanations fixes ")
    assert record["environment"]["threads"] == 1 and record["reasons"] == judging.REASONS
    keys = {"table", "condition", "seeds", "index", "metric", "published", "median", "min", "max", "mark"}
    assert all(keys <= row.keys() for row in record["rows"])
    assert {row["table"] for row in record["rows"]} == {"trace", "rank", "explanations", "fixes"}
    for name in ("trace", "rank", "fixes"):
        assert (folder / "tables" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_recorded_table_command_finds_everything_done(folder, monkeypatch):
    import shlex

    from bcl_fast.experiments import jobs

    before = json.loads((folder / "tables" / "tables.json").read_text())
    monkeypatch.setattr(jobs, "_in_processes", None)
    invoke(*shlex.split(before["command"])[3:])
    assert json.loads((folder / "tables" / "tables.json").read_text())["rows"] == before["rows"]


def test_page_holds_every_part(page):
    sections = "Training: train", "Tables: tables", "Sweep: sweep", "What replicates", "Environment", "Why: shared-mean"
    pictures = "Win rates", "Forces", "Weights and targets", "Coverage", "Reconstructions"
    for title in (*sections, *pictures, tables.TABLES["trace"].title, tables.FIXES_TABLE.title):
        assert title in page, title


def test_page_needs_nothing_beside_itself(page):
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', page)
    assert len(sources) > 10 and all(source.startswith("data:") for source in sources)
    assert "<script" not in page


def test_pictures_are_files_too(folder, page):
    pictures = list((folder / "pictures").iterdir())
    assert len(pictures) == page.count("<img ") and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_tables_without_their_runs_make_a_page(folder, page, tmp_path):
    """As of a committed record: no single run can be shown."""
    shutil.copy(folder / "tables" / "tables.json", tmp_path)
    invoke("report", tmp_path)
    alone = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What replicates" in alone and "Win rates" not in alone


def test_text_is_escaped(folder, tmp_path):
    record = json.loads((folder / "sweep" / "sweep.json").read_text())
    record["command"] = "<script>alert(1)</script>"
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    invoke("report", tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("som_lr", ["0", "1e30"], ids=["nothing is pulled", "everything diverges"])
def test_a_training_in_which(som_lr, tmp_path):
    invoke("train", "--som-lr", som_lr, "--steps", 3, "--out", tmp_path)
    assert "report.html" in invoke("report", tmp_path)


def test_a_sweep_that_diverges_has_a_picture_and_a_page(tmp_path):
    """Its seeds have no median: NaN is null in their records."""
    words = ["--som-lr", "1e30,0.01", "--rescue-k", "1", "--seeds", 2, "--steps", 3, "--workers", 1, "--out", tmp_path]
    assert "1e+30" in invoke("sweep", *words) and (tmp_path / "sweep.png").exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"][0]["held_out_l1"] is None
    assert "report.html" in invoke("report", tmp_path)


def test_an_empty_folder_is_an_error(tmp_path, capfd):
    result = typer_testing.CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "no train.json, tables.json, sweep.json in" in result.stderr + capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def console_of(path, profile):
    """What a browser that opens `path` writes to its console, and the page as it is then."""
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    options = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in off)]
    options += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--dump-dom"]
    command = [BROWSER, *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line], done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_browser_opens_the_page_without_an_error(folder, page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('seen')</script><img src='missing.png'>")
    assert any("seen" in line for line in console_of(bad, tmp_path / "profile")[0])  # this test can fail
    # Pictures say by themselves whether they were decoded.
    checked = folder / "checked.html"
    script = (
        "<script>addEventListener('load', () => { for (const i of document.images)"
        " if (!i.complete || !i.naturalWidth) console.error('broken', i.alt);"
        " document.body.dataset.seen = '1' })</script>"
    )
    checked.write_text(page.replace("</body>", script + "</body>"), encoding="utf-8")
    errors, dom = console_of(checked, tmp_path / "profile")
    assert errors == [] and 'data-seen="1"' in dom and "What replicates" in dom
