"""The documents name places in the code and tests: each must exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _defined_tests() -> set[str]:
    return {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_place_and_test_that_a_document_names_exists(document: str):
    text = (ROOT / "docs" / document).read_text()
    places = set(re.findall(r"`((?:pipeline|trainer|tools|tests|benchmarks)/[\w/.]+)`", text))
    assert {place for place in places if not (ROOT / place).exists()} == set()
    assert {name for name in re.findall(r"`(test_\w+)`", text)} - _defined_tests() == set()


def test_every_row_of_the_paper_has_its_place_and_its_test():
    lines = (ROOT / "docs" / "paper.md").read_text().split("## What it is to be measured against")[0].splitlines()
    rows = [
        line.strip("|").split("|") for line in lines if line.startswith("|") and not line.startswith(("|---", "| what"))
    ]
    assert len(rows) > 35
    assert [row[0] for row in rows if len(row) != 6 or not row[4].strip() or not row[5].strip()] == []
