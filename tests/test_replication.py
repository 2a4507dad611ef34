"""bench/results/replication.md is what bench/results/tables.json gives, and its links and anchors lead somewhere."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import replication  # noqa: E402

PAGE = replication.PAGE.read_text(encoding="utf-8")
RECORD = json.loads(replication.RECORD.read_text(encoding="utf-8"))


def test_page_is_what_the_record_gives():
    """`python bench/replication.py` brings it up to date."""
    assert replication.page(RECORD) == PAGE


def test_page_holds_every_measured_cell():
    """Each document table as often as the document prints numbers, each fix with its loss."""
    for name in replication.DOCUMENT_TABLES:
        (part,) = (part for part in re.split(r"\n##+ ", PAGE) if part.startswith(f"{name}\n"))
        rows = [row for row in RECORD["rows"] if row["table"] == name]
        assert part.count("<br>") == len(rows), name
        assert part.count("**") == 2 * sum(row["mark"] == "outside" for row in rows), name
    for name in {row["row"] for row in RECORD["rows"] if row["table"] == "fixes"}:
        assert PAGE.count(f"\n| {name} | ") == 1, name


def test_links_lead_somewhere():
    anchors = {line.strip("# ").lower().replace(" ", "-") for line in PAGE.splitlines() if line.startswith("#")}
    links = set(re.findall(r"\]\(([^)]+)\)", PAGE))
    assert len(links) > 30
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (replication.RESULTS / link).is_file(), link


def test_a_number_that_is_not_in_the_record_is_an_error():
    rows = [row for row in RECORD["rows"] if row["row"] != "plain"]
    with pytest.raises(KeyError, match="plain"):
        replication.page(RECORD | {"rows": rows})
