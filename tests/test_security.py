"""What the source must not do, read off it: run what a file says, start a shell, make paths of names in archives."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pipeline", "trainer", "tools", "benchmarks", "docs")
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *("shelve.open", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "yaml.load"),
    *("yaml.unsafe_load", "torch.hub.load", "torch.jit.load", "pandas.read_pickle", "xml.etree.ElementTree.parse"),
    *("tempfile.mktemp", "shutil.unpack_archive", "numpy.fromregex"),
}
NEVER_CALLED = {"extractall", "extract"}  # of an archive: names in it would become paths
ONLY = {"shell": False, "allow_pickle": False}  # keywords that may only be given like this


def list_sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def name_of(node: ast.expr, imported: dict[str, str]) -> str:
    """ "os.system" for os.system, for `from os import system` and for `import os as o`."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value, imported)}.{node.attr}"
    return imported.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def find_faults(source: str, shown: str = "") -> list[str]:
    tree, imported, faults = ast.parse(source), {"np": "numpy"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func, imported), {word.arg: word.value for word in node.keywords}
        where = f"{shown}:{node.lineno}: {name}"
        if name in FORBIDDEN or name.rpartition(".")[2] in NEVER_CALLED:
            faults.append(where)
        for word, wanted in ONLY.items():
            if word in given and not (isinstance(given[word], ast.Constant) and given[word].value is wanted):
                faults.append(f"{where}({word}=...)")
        safe = given.get("weights_only")
        if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
            faults.append(f"{where} without weights_only=True")
        if name == "numpy.load" and "allow_pickle" not in given:
            faults.append(f"{where} without allow_pickle=False")
    return faults


def test_nothing_in_the_source_runs_what_a_file_says():
    sources = list_sources()
    assert len(sources) > 100
    assert [fault for path in sources for fault in find_faults(path.read_text(), str(path.relative_to(ROOT)))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as read\nread(b)",
        "import torch\ntorch.load(p)",
        "import torch as t\nt.load(p, weights_only=False)",
        "import numpy as np\nnp.load(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "eval('1')",
        "exec('1')",
        "tar.extractall(p)",
        "archive.extract(member)",
        "import yaml\nyaml.load(p)",
    ],
)
def test_each_of_these_would_be_found(source):
    assert find_faults(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import numpy as np\nnp.load(p, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['ls'], check=True)",
        "model.eval()",
        "import re\nre.compile('a')",
        "tar.extractfile(member)",
    ],
)
def test_none_of_these_is(source):
    assert not find_faults(source)
