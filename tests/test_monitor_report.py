"""From a user's own loop to its page: `Monitor`, then `python -m bcl_fast report`."""

import json
import shutil

import pytest
import torch
from helpers.browser import BROWSER, browser
from torch import nn

typer_testing = pytest.importorskip("typer.testing", reason="needs the extra [demo]")
pytest.importorskip("matplotlib", reason="needs the extra [demo]")
sklearn = pytest.importorskip("sklearn.datasets", reason="needs the extra [demo]")

from bcl_fast import BCLLayer, Monitor, bind_optimizer  # noqa: E402
from bcl_fast import __main__ as cli  # noqa: E402
from bcl_fast.experiments import plots  # noqa: E402
from bcl_fast.monitor import LINES, STEPS  # noqa: E402

STEP = "document.querySelectorAll('.inspector')[{}].querySelector('input[type=range]')"


def report(folder):
    """The page, or what the command says instead."""
    result = typer_testing.CliRunner().invoke(cli.app, ["report", str(folder)])
    page = folder / "report.html"
    if result.exit_code == 0:
        return page.read_text(encoding="utf-8")
    assert result.exit_code == 2 and not page.exists()
    return result.stderr


def train(folder, steps=31, every=10):
    torch.manual_seed(0)
    digits = torch.tensor(sklearn.load_digits().data, dtype=torch.float32) / 16
    model = nn.Sequential(BCLLayer(64, 20, som_lr=0.01), nn.ReLU(), BCLLayer(20, 8, rescue_k=2), nn.Linear(8, 64))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    bind_optimizer(model, optimizer)
    with Monitor(model, optimizer, every, folder) as monitor:
        for _ in range(steps):
            x = digits[torch.randint(len(digits), (40,))]
            loss = nn.functional.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    train(folder)
    return folder


@pytest.fixture
def folder(measured, tmp_path):
    """A copy to spoil."""
    shutil.copytree(measured, tmp_path / "runs", ignore=shutil.ignore_patterns("report.html", "pictures"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def page(measured):
    return report(measured)


def test_page_has_a_section_a_layer(measured, page):
    for text in ("Layer 0", "Layer 2", "20 features of 64 inputs; som_lr 0.01; backend", "rescue_k 2", "Environment"):
        assert text in page, text
    assert page.count('class="inspector"') == 2 and page.count("Step inspector") == 2
    pictures = sorted((measured / "pictures").iterdir())
    assert len(pictures) == page.count("<img ") == 9  # only the first layer sees images


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_page_works_in_a_browser(measured, page, tmp_path):
    with browser(tmp_path / "profile") as window:
        window.open(measured / "report.html")
        window.until("document.querySelectorAll('.inspector[data-ready]').length == 2")
        assert window.evaluate("Array.from(document.images).every(image => image.naturalWidth > 0)")
        assert window.evaluate(f"{STEP.format(1)}.max") == "3"  # steps 0, 10, 20, 30
        window.evaluate(f"{STEP.format(1)}.focus()")
        window.press("ArrowRight")
        shown = "document.querySelectorAll('.inspector')[{}].innerText.includes('Step {} ')"
        window.until(shown.format(1, 10))
        assert window.evaluate(shown.format(0, 0))
        assert window.messages == []


def test_lines_alone_make_a_page(folder):
    shutil.rmtree(folder / STEPS)
    alone = report(folder)
    assert "Layer 2" in alone and "Last measured step" in alone and "<script" not in alone


@pytest.mark.filterwarnings("ignore:Monitor has measured no step")
def test_a_start_without_a_step_makes_a_page(tmp_path):
    train(tmp_path, steps=0)
    assert report(tmp_path).count("No step has been measured yet.") == 2


def test_several_folders_make_one_page(tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name, steps=1)
    together = report(tmp_path)
    for title in ("Layer 0: one", "Layer 0: two", "Layer 2: two"):
        assert title in together
    assert len(list((tmp_path / "pictures").iterdir())) == together.count("<img ")


def test_a_layer_may_have_any_name(tmp_path):
    model, names = nn.Module(), ("a/b", "<b>", "a-b", r"$\frac$", 300 * "a", 300 * "a" + "b")
    for name in names:
        model.add_module(name, BCLLayer(6, 4))
    with Monitor(model, every=1, out=tmp_path) as monitor:
        for name in names:
            model.get_submodule(name)(torch.rand(5, 6)).sum().backward()
            monitor.log(**{r"loss$\sum$": 1.7e308})
    named = report(tmp_path)
    assert "Layer a/b" in named and "Layer &lt;b&gt;" in named
    assert len(list((tmp_path / "pictures").iterdir())) == named.count("<img ")


def test_numbers_that_no_axis_holds_are_gaps_on_a_page(tmp_path):
    """As of a float64 training that diverges: an axis from one end of all numbers to the other has no length."""
    layer = BCLLayer(13, 11)
    with Monitor(layer, every=1, out=tmp_path) as monitor:
        for loss in (-1e308, 1.0, 1e308):
            layer(torch.rand(9, 13)).square().mean().backward()
            monitor.log(loss=loss)
    assert "Layer BCLLayer" in report(tmp_path)


def test_what_fails_in_drawing_is_not_the_folder_s_fault(folder, monkeypatch):
    """Else it would tell people to delete what is whole."""
    for error in (MemoryError, RuntimeError):

        def fails(*_, error=error):
            raise error("font")

        monkeypatch.setattr(plots, "save", fails)
        result = typer_testing.CliRunner().invoke(cli.app, ["report", str(folder)])
        assert isinstance(result.exception, error) and "delete" not in result.output


def lines(folder, change):
    path = folder / LINES
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def tensors(folder, change):
    path = folder / STEPS / "0-10.pt.gz"
    change(path)


DAMAGES = {
    "a broken line": (
        lambda f: lines(f, lambda rows: [*rows[:3], "{\n", *rows[3:]]),
        "line 4 of {}/monitor.jsonl is damaged",
    ),
    "no start": (lambda f: lines(f, lambda rows: rows[1:]), "line 1 of {}/monitor.jsonl is damaged"),
    "an empty file": (lambda f: lines(f, lambda rows: []), "{}/monitor.jsonl is damaged"),
    "a line without a metric": (
        lambda f: lines(f, lambda rows: [*rows, json.dumps({"layer": "0", "step": 99, "wt_sim": 0.1}) + "\n"]),
        "{}/",
    ),
    "tensors cut short": (lambda f: tensors(f, lambda p: p.write_bytes(p.read_bytes()[:500])), "0-10.pt.gz is damaged"),
    "tensors gone": (lambda f: tensors(f, lambda p: p.unlink()), "cannot read or write {}/steps/0-10.pt.gz"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_folder_is_one_line(folder, damage, capfd):
    spoil, message = DAMAGES[damage]
    spoil(folder)
    said = report(folder) + capfd.readouterr().err
    assert message.format(folder) in said and said.count("\n") == 1 and said.startswith("error: "), said
