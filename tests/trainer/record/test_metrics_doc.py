"""docs/metrics.md lists every field and event that the code writes, and none that it does not."""

import ast
import re
from dataclasses import fields
from pathlib import Path

from trainer.record.metrics import EvalRecord, GpuFields, TrainRecord
from trainer.record.progress import Status

ROOT = Path(__file__).resolve().parents[3]


def read_tables():
    """Per heading: the rows of its table, as lists of what stands in backticks in the first two cells."""
    sections = re.split(r"^## ", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = {}
    for section in sections[1:]:
        rows = [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| `", line)]
        tables[section.splitlines()[0]] = {
            cells[0].strip().strip("`"): re.findall(r"`(\w+)`", cells[1]) for cells in rows
        }
    return tables


def table(start):
    (found,) = [rows for title, rows in read_tables().items() if title.startswith(start)]
    return found


def calls(method):
    """Of the calls x.method(...) in the trainer: positional constants, names of keywords."""
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == method:
                yield node


def test_every_field_of_the_records_is_documented_and_no_other():
    assert set(table('`kind: "train"`')) == {*TrainRecord.__annotations__, *GpuFields.__annotations__}
    assert set(table('`kind: "eval"`')) == set(EvalRecord.__annotations__)


def test_every_event_in_the_code_is_documented_with_its_fields():
    written = {}
    for node in calls("event"):
        named = {keyword.arg for keyword in node.keywords} - {None}
        for constant in ast.walk(node.args[0]) if node.args else ():
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                written[constant.value] = named
    assert written == {name: set(found) for name, found in table('`kind: "event"`').items()}


def test_every_object_of_json_logs_is_documented_with_its_fields():
    written = {"progress": {"epochs", *(field.name for field in fields(Status))}}
    for node in [*calls("print_line")]:
        if node.args and isinstance(node.args[0], ast.Dict):
            keys = [key.value for key in node.args[0].keys if key is not None]
            kind = node.args[0].values[keys.index("kind")].value
            written.setdefault(kind, set()).update(set(keys) - {"kind"})
    (announce,) = calls("announce")
    written["run"] |= {keyword.arg for keyword in announce.keywords}
    written["note"] = {"text"}  # pipeline/common/console.py
    assert written == {name: set(found) for name, found in table("`alexnet-train --json-logs`").items()}


def test_tensorboards_tags_are_documented():
    from trainer.report.tensorboard import _SCALARS

    said = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## TensorBoard")[1]
    for tag in (tag for tags in _SCALARS.values() for tag in tags.values()):
        group, _, name = tag.partition("/")
        assert f"`{tag}`" in said or (f"`{group}`" in said and f"`/{name}`" in said), tag
