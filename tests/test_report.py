"""The page and its pictures: complete, self-contained, and opened in a browser without an error."""

import json
import os
import re
import shutil
import time

import pytest

typer_testing = pytest.importorskip("typer.testing", reason="needs the extra [demo]")
pytest.importorskip("matplotlib", reason="needs the extra [demo]")
pytest.importorskip("sklearn", reason="needs the extra [demo]")

from helpers.browser import BROWSER, Failed, browser  # noqa: E402

from bcl_fast import __main__ as cli  # noqa: E402
from bcl_fast.experiments import judging, tables  # noqa: E402

BODY = "document.body.innerText"


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
    assert "no train.json, tables.json, sweep.json, monitor.jsonl in" in result.stderr + capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_browser_opens_the_page_without_an_error(folder, page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('seen'); nothing.at.all</script><img src='missing.png'>")
    broken = "Array.from(document.images).filter(i => !i.complete || !i.naturalWidth).map(i => i.alt || i.src)"
    with browser(tmp_path / "profile") as window:
        window.open(bad)  # this test can fail
        said = "\n".join(window.messages)
        assert "error: seen" in said and "ReferenceError" in said and "ERR_FILE_NOT_FOUND" in said
        assert len(window.evaluate(broken)) == 1
        window.open(folder / "report.html")
        assert window.messages == [] and window.evaluate(broken) == []
        assert window.evaluate("document.images.length") > 10 and "What replicates" in window.evaluate(BODY)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_no_browser_outlives_a_failure(tmp_path):
    with pytest.raises(Failed, match="ReferenceError"), browser(tmp_path / "profile") as window:
        group = window.evaluate("1") and window.group
        window.evaluate("nothing.at.all")
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # ended processes stay a moment
            os.killpg(group, 0)
            time.sleep(0.1)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    with browser(tmp_path / "profile") as window:
        monkeypatch.setattr("helpers.browser.LIMIT", 0.2)
        with pytest.raises(Failed, match="does not answer within"):
            window.evaluate("new Promise(() => {})")
