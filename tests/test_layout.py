"""Who may import whom, read from the sources; and what `--help` may import, seen in a process of its own."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "trainer", "tools")
FORBIDDEN = {"pipeline": {"trainer", "tools"}, "trainer": {"tools"}, "tools": {"trainer"}}
MAY_IMPORT_DALI = {"pipeline/graph.py", "tools/doctor.py"}
HEAVY = ("torch", "nvidia.dali", "numpy")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def list_sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def find_imports(source: str) -> Iterator[str]:
    """The full name of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b as c\ndef f():\n    from d import e\nif x:\n    from g.h import i as j, k\n"
    assert set(find_imports(source)) == {"a.b", "d.e", "g.h.i", "g.h.k"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_it_must_not_know(package):
    sources = list_sources(package)
    assert len(sources) > 5
    for path in sources:
        roots = {name.split(".")[0] for name in find_imports(path.read_text(encoding="utf-8"))}
        assert not roots & (FORBIDDEN[package] | {"tests"}), path


def test_dali_is_imported_in_the_graph_and_the_doctor_alone():
    importing = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in list_sources(package)
        if any((name + ".").startswith("nvidia.dali.") for name in find_imports(path.read_text(encoding="utf-8")))
    }
    assert importing <= MAY_IMPORT_DALI
    assert "pipeline/graph.py" in importing


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_command_exits_0_without_importing_dali_torch_or_numpy(script):
    module, _, function = SCRIPTS[script].partition(":")
    program = (
        "import importlib, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"try: importlib.import_module({module!r}).{function}()\n"
        "except SystemExit as error: status = error.code\n"
        f"print('status', status, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == "" and "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "status 0 []"
