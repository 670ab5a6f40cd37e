"""The documents name places in the code and tests: each must exist."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.docs.documents import find_anchors, find_broken_links

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern))


def _defined_tests() -> set[str]:
    return {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_place_and_test_that_a_document_names_exists(path: Path):
    text = path.read_text()
    places = set(re.findall(r"`((?:pipeline|trainer|tools|tests|benchmarks)/[\w/.]+)`", text))
    assert {place for place in places if "NAME" not in place and not (ROOT / place).exists()} == set()
    assert {name for name in re.findall(r"`(test_\w+)`", text)} - _defined_tests() == set()


def test_every_row_of_the_paper_has_its_place_and_its_test():
    lines = (ROOT / "docs" / "paper.md").read_text().split("## What it is to be measured against")[0].splitlines()
    rows = [
        line.strip("|").split("|") for line in lines if line.startswith("|") and not line.startswith(("|---", "| what"))
    ]
    assert len(rows) > 35
    assert [row[0] for row in rows if len(row) != 6 or not row[4].strip() or not row[5].strip()] == []


def test_each_name_behind_a_place_in_the_paper_is_defined_there():
    text, checked = (ROOT / "docs" / "paper.md").read_text(), 0
    for place, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text):
        source = (ROOT / place).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?: *(?:def|class) {name}\b|{name}\b.* = )", source, re.MULTILINE), f"{place}: {name}"
            checked += 1
    assert checked >= 12


def test_the_errors_to_be_measured_against_are_those_that_commands_print():
    from trainer.nets.tables import PUBLISHED

    text = (ROOT / "docs" / "paper.md").read_text().split("## What it is to be measured against")[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| (?!run \|)", line)]
    stated = [[float(number) for cell in cells for number in re.findall(r"[\d.]+", cell)] for _, _, *cells in rows]
    assert sorted(stated) == sorted([error for error in errors if error is not None] for _, _, *errors in PUBLISHED)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(path: Path):
    assert find_broken_links(path) == []


def test_a_link_to_nothing_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`: c/d\n\n## Two\n\n## Two\n\n[1](#a-b-cd) [2](#a-b-c-d) [3](no.md) ![4](no.png) [5](page.md#two-1)\n"
    )
    assert find_anchors(page.read_text()) == {"a-b-cd", "two", "two-1"}
    assert find_broken_links(page) == ["#a-b-c-d", "no.md", "no.png"]


def test_the_readme_leads_to_every_document():
    text = (ROOT / "README.md").read_text()
    documents = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    assert [name for name in [*documents, "CONTRIBUTING.md", "benchmarks/README.md"] if f"({name}" not in text] == []


def test_the_readme_lists_every_recipe_and_contributing_every_extra():
    from trainer.recipe import RECIPES

    table = (ROOT / "README.md").read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(RECIPES)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [extra for extra in extras if extra != "dev" and f"(extra `{extra}`)" not in text] == []
    readme = (ROOT / "README.md").read_text()
    assert [extra for extra in extras if extra not in ("dev", "docs") and f"`{extra}`" not in readme] == []
