"""bcl_fast/SPEC.md is what the code does by name: its options, its table of stages, and every citation of it."""

import importlib
import re
from pathlib import Path

import pytest

from bcl_fast import backends, cuda
from bcl_fast.spec import CHOICES, PRESETS, BCLConfig

ROOT = Path(__file__).resolve().parents[1]
SPEC = (ROOT / "bcl_fast" / "SPEC.md").read_text(encoding="utf-8")
SECTIONS = {int(number): text for number, text in re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", SPEC, re.M | re.S)}
STEPS = set(re.findall(r"^(\d+)\. \*\*", SECTIONS[2], re.M))
STEPS |= {"9" + letter for letter in re.findall(r"^   - ([a-z])\. \*", SECTIONS[2], re.M)}


def cells(section):
    """The rows of the table of a section, each a list of its cells, headings first."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in [lines[0], *lines[2:]]]


def test_sections_and_steps_are_numbered_without_a_gap():
    assert sorted(SECTIONS) == list(range(1, 8))
    assert STEPS == {*map(str, range(1, 14)), "9a", "9b"}


# --- Options ----------------------------------------------------------------------------------------------------------


def test_every_option_is_there_with_its_default_first():
    found = {}
    for names, values, _ in cells(3)[1:]:
        defaults = [value.strip("` ") for value in values.split(",")]
        for name, default in zip(re.findall(r"`(\w+)`", names), defaults, strict=False):
            found[name] = default.split(" to ")[0]
        if names.strip("`") in CHOICES:
            assert tuple(defaults) == CHOICES[names.strip("`")], names
    assert found == {name: str(value) for name, value in BCLConfig().to_dict().items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_there_with_what_it_sets(preset):
    given = re.search(rf"`{preset}`\s+\(([^)]*)\)", SECTIONS[3])[1]
    for name, value in PRESETS[preset].items():
        assert re.search(rf"(^|[ `]){value}($|[`,])", given), (name, value)


# --- The table of stages ----------------------------------------------------------------------------------------------

HEADINGS, *ROWS = cells(7)
TABLE = {row[0].strip("`"): dict(zip(HEADINGS[1:], (cell.strip("`") for cell in row[1:]), strict=True)) for row in ROWS}


def test_the_table_has_every_stage():
    assert list(TABLE) == list(backends.STAGES)


@pytest.mark.parametrize("stage", TABLE)
def test_what_the_table_names_is_there(stage):
    row = TABLE[stage]
    assert all(step in STEPS for step in row["steps"].split(" to "))
    for backend in ("reference", "portable"):
        module, name = row[backend].split(".")
        assert (module, name) == (backend, stage)
        assert callable(getattr(importlib.import_module(f"bcl_fast.{module}"), name))
    for heading in ("C++", "Triton", "CUDA C++", "test", "bench"):
        assert not row[heading] or (ROOT / row[heading]).is_file(), row[heading]
    triton = (ROOT / row["Triton"]).read_text(encoding="utf-8")
    assert row["Triton"] == f"kernels/{backends.STAGES[stage]}.py" and f"\ndef {stage}(" in triton
    assert bool(row["CUDA C++"]) == (stage in cuda.DECLINES)
    assert f'"{stage}"' in (ROOT / row["test"]).read_text(encoding="utf-8")
    assert row["bench"]


# --- Citations --------------------------------------------------------------------------------------------------------

TEXTS = (".py", ".md", ".cpp", ".cu", ".cuh", ".h", ".inc", ".sh", ".toml", ".html", ".yml")
FOLDERS = ("bcl_fast", "kernels", "csrc", "bench", "tests", ".ci")
MANY_STEPS = 20  # from here on a step is one of a training, which may have any number
STEP = r"\d+[a-z]?\b(?![.,]\d)"
AND = r"(?:,\s+(?:and\s+)?|\s+(?:and|to)\s+)"
LIST = re.compile(rf"\b[Ss]tep(?:s\s+({STEP}(?:{AND}{STEP})+)|\s+({STEP}))")
SECTION = re.compile(rf"\bSPEC\s+sections?\s+(\d(?:{AND}\d)*)")
BARE = re.compile(r"(?<![-\w])9[ab]\b")
ELSEWHERE = re.compile(r"\b(PERFORMANCE|DESIGN|STYLE|SCIENCE|DISTRIBUTED|LANDSCAPE|ROADMAP)\b|§|\bsections? \d")


def wrong_citations(text):
    """What a text cites in another form than "step 9b" and "SPEC section 3", or that is not there."""
    text, found = re.sub(r"\n[ \t]*(?://|#)[ \t]*", " ", text), []  # a comment goes on in the next line
    for several, one in LIST.findall(text):
        for step in re.findall(r"\d+[a-z]?", several or one):
            training = step.isdigit() and (int(step) == 0 or int(step) >= MANY_STEPS)
            found += [f"step {step}"] * (step not in STEPS and not training)
    for sections in SECTION.findall(text):
        found += [f"SPEC section {n}" for n in re.findall(r"\d", sections) if int(n) not in SECTIONS]
    rest = SECTION.sub("", LIST.sub("", text).replace("SPEC.md", ""))
    rest = re.sub(r"^\|.*", lambda row: re.sub(r"\b9[ab]\b", "", row[0]), rest, flags=re.M)  # a column of steps
    found += re.findall(r".*\bSPEC\b.*", rest) + [match[0] for match in BARE.finditer(rest)]
    return found + [match[0] for match in ELSEWHERE.finditer(rest)]


def texts(folder):
    """Every text of a folder, or of the root itself, except this test and the page."""
    for path in sorted((ROOT / folder).rglob("*") if folder else ROOT.glob("*")):
        kind = path.suffix in TEXTS or folder == ".ci"
        if kind and path.is_file() and path.name not in ("SPEC.md", Path(__file__).name):
            yield path


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_every_citation_resolves(folder):
    wrong = {str(path.relative_to(ROOT)): wrong_citations(path.read_text(encoding="utf-8")) for path in texts(folder)}
    assert wrong and {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    "text",
    [
        "(SPEC 9b)",
        "(SPEC 2.9a)",
        "SPEC step 12",
        "SPEC 3",
        "SPEC section 8",
        "SPEC sections 2 and 9",
        "the SPEC names",
        "(sums of 9a)",
        "step 9c",
        "steps 12 to 14",
        "Steps 9a, 10 and 12b",
        "section 5",
        "(PERFORMANCE 4)",
        "§ 3",
        "of SPEC\n    # section 8",
        "steps 9a, 10\n// and 14",
    ],
)
def test_a_wrong_citation_is_seen(text):
    assert wrong_citations(f"# Why {text}: a reason.")


@pytest.mark.parametrize(
    "text",
    [
        "step 9b",
        "Steps 9a, 10 and 13",
        "steps 2 to 8, and what follows",
        "SPEC section 3",
        "SPEC sections 2 and 5",
        "SPEC.md",
        "# of SPEC\n    # sections 2\n# and 5",
        "starts at step 0",
        "at step 50 and 16 at 300",
        "up to step 10,000",
        "| `selection.py` | 9a to 10 |",
    ],
)
def test_a_right_citation_is_let_pass(text):
    assert wrong_citations(text) == []
