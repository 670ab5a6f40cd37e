"""Who may import whom, read from the sources; and what `--help` may import, seen in a process of its own."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "trainer", "tools")
FORBIDDEN = {"pipeline": {"trainer", "tools"}, "trainer": {"tools"}, "tools": {"trainer"}}
MAY_IMPORT_DALI = {"pipeline/graph.py", "pipeline/operators/__init__.py", "tools/checks/facts.py"}
OFF_THE_MAP = {"pipeline": {"errors.py"}}  # a name of before, that users import
LARGEST_ROOM = 15
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


def read_layers() -> dict[str, dict[str, int]]:
    """Of each package: its rooms and files, by CONTRIBUTING.md, with the layer of each, the uppermost 0."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    layers = {}
    for line in lines:
        words = line.split()
        if line.startswith("    ") and words[0] in PACKAGES and ">" in words:
            order = line.split(maxsplit=1)[1].split(">")
            layers[words[0]] = {unit.strip(): n for n, layer in enumerate(order) for unit in layer.split(",")}
    return layers


def list_edges(package: str) -> Iterator[tuple[str, str]]:
    """(module, module of the same package that it imports), but for imports that only a type checker makes."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in list_sources(package)}
    for path in list_sources(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in find_imports(ast.unparse(tree)):
            found = name if name in modules else name.rpartition(".")[0]
            if found in modules and found != module:
                yield module, found


def unit_of(module: str) -> str:
    """The room or file of a package's top level: trainer.nets.onnx -> nets."""
    return module.split(".")[1]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_imports_one_above_it(package):
    layer = read_layers()[package]
    edges = [(a, b) for a, b in list_edges(package) if "__" not in unit_of(a) + unit_of(b)]
    assert edges and {unit_of(module) for edge in edges for module in edge} <= set(layer)
    assert [(a, b) for a, b in edges if layer[unit_of(a)] > layer[unit_of(b)]] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    imports: dict[str, set[str]] = {}
    for module, imported in list_edges(package):
        imports.setdefault(module, set()).add(imported)
    while imports:
        standing = {module: names & set(imports) for module, names in imports.items()}
        standing = {module: names for module, names in standing.items() if names}
        if standing == imports:
            break
        imports = standing
    assert imports == {}  # what is left stands in a circle, or above one


def read_table(heading: str) -> list[list[str]]:
    """The cells, without the head, of CONTRIBUTING.md's table that begins with the column `heading`."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"\n| {heading} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()[2:]]


def find_quoted(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_the_map_of_packages_in_contributing_is_the_one_that_is_held():
    rows = {row[0].strip("`"): row for row in read_table("package | imports")}
    assert {name: find_quoted(row[2]) for name, row in rows.items()} == FORBIDDEN
    for package, row in rows.items():
        roots = {name.split(".")[0] for path in list_sources(package) for name in find_imports(path.read_text("utf-8"))}
        assert (roots & set(PACKAGES)) - {package} == find_quoted(row[1])


def test_libraries_are_imported_where_contributing_says_and_nowhere_else():
    rows = read_table("library")
    assert len(rows) > 10
    places = {library: find_quoted(row[1]) for row in rows for library in find_quoted(row[0])}
    assert places["nvidia.dali"] == MAY_IMPORT_DALI
    seen: dict[str, set[str]] = {library: set() for library in places}
    for package in PACKAGES:
        for path in list_sources(package):
            where = path.relative_to(ROOT)
            for name in find_imports(path.read_text(encoding="utf-8")):
                for library in places:
                    if f"{name}.".startswith(f"{library}."):
                        assert any(where.match(place) for place in places[library]), f"{where} imports {library}"
                        seen[library] |= {place for place in places[library] if where.match(place)}
    assert seen == places


def list_rooms(package: str) -> set[Path]:
    return {path.parent for path in list_sources(package)}


def test_every_room_is_on_the_map_with_what_lies_beside_the_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Map\n")[1].split("\n## ")[0]
    for package in PACKAGES:
        section = re.split(r"\n    (?=\w+/ )", text.split(f"\n    {package}/ ")[1])[0]
        words = set(section.split())
        rooms = {f"{room.relative_to(ROOT / package)}/" for room in list_rooms(package)} - {"./"}
        files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py", "__main__.py"}
        assert rooms == {word for word in words if word.endswith("/")}
        assert files - words == OFF_THE_MAP.get(package, set())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_holds_at_most_fifteen_files(package):
    for room in list_rooms(package):
        assert len(list(room.glob("*.py"))) <= LARGEST_ROOM, room


def test_dali_is_imported_in_the_graph_the_operators_and_the_doctor_alone():
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


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_and_whatever_is_public_in_it_has_a_docstring(package):
    bare = []
    for path in list_sources(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        nodes = [tree, *public] if path.name != "__main__.py" else public
        bare += [
            f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'the module')}"
            for node in nodes
            if not ast.get_docstring(node)
        ]
    assert bare == []


def test_what_contributing_says_to_follow_is_in_the_files_it_names():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Follow one\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    batch = text.split("\n\n")[2].splitlines()
    assert len(batch) - 2 == 10 and len(rows) > 20
    for row in rows:
        path, *names = re.findall(r"`([^`]+)`", row)
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in names:
            assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", source, re.MULTILINE), row
