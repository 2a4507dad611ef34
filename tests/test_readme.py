"""README and guide are true: blocks run, commands and files are there, numbers are those of the records."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import results

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = "README.md", "bcl_fast/GUIDE.md"
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (README, GUIDE)}
BLOCKS = [
    pytest.param(name, block, id=f"{Path(name).stem}-{i}")
    for name, page in PAGES.items()
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))
]


@pytest.mark.parametrize("name, block", BLOCKS)
def test_python_block_runs(name, block, tmp_path, monkeypatch):
    for framework in re.findall(r"^(?:import|from) (lightning|transformers)\b", block, re.M):
        pytest.importorskip(framework, reason="needs the extra [integrations]")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, name, "exec"), {"__name__": "page"})


def test_the_readme_is_short():
    assert len(PAGES[README].encode()) <= 9_000


def commands():
    """Every `python -m bcl_fast ...` of both pages as a line of words."""
    found = re.findall(r"python -m bcl_fast ([^`\n]*)", "\n".join(PAGES.values()))
    assert len(found) >= 3
    return sorted({line.split("&&")[0].strip() for line in found})


@pytest.mark.parametrize("line", commands())
def test_command_and_its_options_exist(line):
    pytest.importorskip("typer")
    words = shlex.split(line, comments=True)
    command = words[: 2 if words[0] == "bench" else 1]
    help_text = subprocess.run(
        [sys.executable, "-m", "bcl_fast", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout  # fmt: skip
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text, option


@pytest.mark.parametrize("name", ["test-command", "main-command"])
def test_marked_commands_are_one_line_each(name):
    """`.ci/run` executes them literally."""
    found = re.findall(rf"^<!-- {name} -->\n```sh\n(.*?)^```", PAGES[README], re.M | re.S)
    assert len(found) == 1 and found[0].count("\n") == 1


def headings(path):
    """The anchors of a page: its headings in small letters, with - for blanks."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    assert links
    for link in links:
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.is_file(), link
        assert not anchor or anchor in headings(path), link


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_are_there(name):
    paths = re.findall(r"\b(?:bench|tests|csrc|kernels)/[\w/]+\.\w+", PAGES[name])
    assert [path for path in paths if not (ROOT / path).exists()] == []


# --- Numbers ----------------------------------------------------------------------------------------------------------

RESULTS = ROOT / "bench" / "results"


def record(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_five_rows_are_those_of_the_record():
    """`python bench/results.py` brings them up to date."""
    assert PAGES[README] == results.updated(PAGES[README], RESULTS)


def test_the_cpu_backend_keeps_its_promise_of_memory():
    rows = [row for row in record("cpu.json")["rows"] if (row["question"], row["contestant"]) == ("memory", "cpu")]
    assert rows and all(row["mb_beyond_linear"] <= row["one_bd_and_one_dn_mb"] for row in rows)


def test_what_is_said_of_quality_is_what_the_record_has():
    rows = [row for row in record("tables.json")["rows"] if row["table"] == "fixes"]
    mean = {(row["row"], row["column"]): row["mean"] for row in rows}  # under the first spelling of a condition

    def said(condition, column, digits):
        return f"{mean[condition, column]:.{digits}f}".removeprefix("0")

    text = " ".join(PAGES[README].split())
    bcl, plain = "decoupled (0.001)", "plain"
    for sentence in (
        f"(som_lr 0.001) has a held-out L1 of {said(bcl, 'L1', 3)}, plain training {said(plain, 'L1', 3)};",
        f"mean cosine {said(bcl, 'wt_sim', 2)} against {said(plain, 'wt_sim', 2)}",
        f"all {said(bcl, 'firing', 0)} features fire, of the plain network {said(plain, 'firing', 0)};",
        f"beat the plain network ({said('4 centred targets, no mask (0.01)', 'L1', 3)})",
        f"BCL ({said('centred inputs (0.001)', 'L1', 3)}) and without ({said('plain, centred inputs', 'L1', 3)})",
    ):
        assert sentence in text, sentence
    assert mean["plain, dead redrawn", "firing"] == mean[bcl, "firing"]
    assert mean["plain, dead redrawn", "L1"] <= mean[plain, "L1"]
